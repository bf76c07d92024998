// Applies the stored theme before the first paint; not a module, because modules run after it.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("unmask.theme")) ?? "auto";
} catch {
  document.documentElement.dataset.theme = "auto";
}
