// Gives the arrows of the navigation a name, for those who hear the page.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll("nav details > summary")) {
    const link = summary.parentElement.parentElement.querySelector("a");
    if (link && !summary.textContent.trim()) summary.setAttribute("aria-label", `More of ${link.textContent}`);
  }
});
