"""unmask.cli"""
