"use strict";
// What the scripts of the page share. The page is complete without them, apart from the controls.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;

// Texts of runs and samples enter the page through textContent alone.
function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// Controls are hidden where no script could answer them.
for (const element of document.querySelectorAll("[data-control]")) element.hidden = false;
