// Before the first paint: the theme chosen earlier. Not a module, since modules run after it.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("unmask.theme")) ?? "auto";
} catch {
  document.documentElement.dataset.theme = "auto";
}
