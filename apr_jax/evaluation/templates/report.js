"use strict";
(() => {
  const texts = JSON.parse(document.getElementById("texts").textContent);
  const title = document.getElementById("call-title");
  const pre = document.getElementById("call-text");
  if (!title) return;

  const addLines = (text, kind) => {
    for (const line of text.split(/(?<=\n)/)) {
      const span = document.createElement("span");
      span.textContent = line;
      if (kind) span.className = kind;
      else if (/ equal: Goal Reached/.test(line)) span.className = "goal";
      else if (line.startsWith("<")) span.className = "tag";
      pre.append(span);
    }
  };
  const showCall = (rollout, call) => {
    document.querySelectorAll(".call.chosen").forEach((g) => g.classList.remove("chosen"));
    document.querySelector(`.rollout[data-rollout="${rollout}"] .call[data-call="${call}"]`)?.classList.add("chosen");
    const shown = texts[rollout][call];
    title.textContent = `${shown.title}: ${shown.note}`;
    pre.replaceChildren();
    addLines(shown.context, "context");
    addLines(shown.text, "");
    pre.scrollTop = 0;
  };
  const showRollout = (rollout) => {
    document.querySelectorAll(".rollout").forEach((div) => { div.hidden = div.dataset.rollout !== rollout; });
    document.querySelectorAll(".choices button").forEach((b) => b.classList.toggle("chosen", b.dataset.rollout === rollout));
    showCall(rollout, 0);
  };
  document.querySelectorAll(".choices button").forEach((b) => b.addEventListener("click", () => showRollout(b.dataset.rollout)));
  document.querySelectorAll(".call").forEach((g) =>
    g.addEventListener("click", () => showCall(g.closest(".rollout").dataset.rollout, g.dataset.call)));
  showRollout("0");
})();
