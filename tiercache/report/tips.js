// Tips: what the titles in the drawings say, where the pointer is. Without this script browsers show the titles themselves.
"use strict";
(() => {
  const box = document.createElement("div");
  box.className = "tip-box";
  box.hidden = true;
  document.body.append(box);
  const place = (event) => {
    const gap = 14;
    const right = event.clientX + gap + box.offsetWidth < document.documentElement.clientWidth;
    const left = right ? event.clientX + gap : Math.max(4, event.clientX - gap - box.offsetWidth);
    const top = Math.min(event.clientY + gap, window.innerHeight - box.offsetHeight - 4);
    box.style.left = `${left}px`;
    box.style.top = `${Math.max(4, top)}px`;
  };
  for (const part of document.querySelectorAll(".tip")) {
    const title = part.querySelector("title");
    const text = title.textContent;
    title.remove();
    part.addEventListener("pointerenter", (event) => {
      box.textContent = text;
      box.hidden = false;
      place(event);
    });
    part.addEventListener("pointermove", place);
    part.addEventListener("pointerleave", () => { box.hidden = true; });
  }
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
