"""unmask.engine"""
