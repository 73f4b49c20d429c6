"use strict";
/* Light and dark as the system has it, until the button #theme (or the key t) chooses. The choice is remembered where
   the browser lets a local file remember. The dark colours are one style element, which is switched as a whole. */
(() => {
  const dark = document.getElementById("dark");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const remember = () => { try { localStorage.setItem("theme", theme); } catch { /* until the page is closed */ } };
  let theme = remembered();
  const isDark = () => (theme === null ? system.matches : theme === "dark");
  const apply = () => {
    dark.media = theme === null ? "(prefers-color-scheme: dark)" : theme === "dark" ? "all" : "not all";
    const button = document.getElementById("theme");
    if (button) button.textContent = isDark() ? "Light" : "Dark";
  };
  const toggle = () => {
    theme = isDark() ? "light" : "dark";
    remember();
    apply();
  };
  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", toggle);
    apply();
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("select, input, textarea");
    if (event.key === "t" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) toggle();
  });
})();
