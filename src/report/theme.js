(function () {
  var root = document.documentElement;
  var button = document.getElementById("theme");
  var names = ["system", "light", "dark"];
  var at = 0;
  button.hidden = false;
  button.addEventListener("click", function () {
    at = (at + 1) % names.length;
    if (at === 0) { root.removeAttribute("data-theme"); } else { root.setAttribute("data-theme", names[at]); }
    button.textContent = "Theme: " + names[at];
  });
})();
