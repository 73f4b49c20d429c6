"use strict";
/* The thread viewer: rollouts drawn as threads, their texts token by token, two of them side by side.
   Data (thread_view.py): {tokens: [text], rollouts: [{label, name, key, correct, verdict, threads}]}, a thread
   {name, result, kind, critical, calls}, a call {index, context, tokens: [number], logprobs, kept, advantage, note}. */
(() => {
  const data = JSON.parse(document.getElementById("rollouts").textContent);
  const section = document.getElementById("threads");
  const drawings = section.querySelectorAll("template.drawing");
  const control = (id) => section.querySelector(`#${id}`);
  const SURPRISES = [0.05, 0.25, 0.7, 1.5, 3];

  const element = (name, className, text = "") => {
    const made = document.createElement(name);
    made.className = className;
    made.textContent = text;
    return made;
  };
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

  class Pane {
    constructor(side) {
      this.root = section.querySelector(`.pane[data-side="${side}"]`);
      for (const name of ["about", "drawing", "thread", "text", "value"]) this[name] = this.root.querySelector(`.${name}`);
      this.drawing.addEventListener("click", (event) => {
        const bar = event.target.closest(".call");
        if (bar) this.chooseCall(Number(bar.dataset.call));
      });
      this.drawing.addEventListener("keydown", (event) => this.moveThread(event));
      this.text.addEventListener("keydown", (event) => this.moveToken(event));
      this.text.addEventListener("mouseover", (event) => {
        const token = event.target.closest(".token");
        if (token) this.showValue(token);
      });
    }

    show(index) {
      this.index = index;
      this.about.classList.remove("right", "wrong");
      this.drawing.replaceChildren();
      this.text.replaceChildren();
      this.thread.textContent = this.value.textContent = "";
      if (index === undefined) {
        this.about.textContent = "This problem's rollout was not kept here.";
        return;
      }
      const rollout = data.rollouts[index];
      this.about.textContent = `${rollout.label}: ${rollout.name}`;
      this.about.classList.add(rollout.correct ? "right" : "wrong");
      this.drawing.append(drawings[index].content.cloneNode(true));
      this.choose(0);
    }

    /* The number-th row of the drawing. */
    choose(number, callIndex) {
      const thread = data.rollouts[this.index].threads[number];
      this.number = number;
      const calls = new Set(thread.calls.map((call) => String(call.index)));
      let first = true;
      for (const bar of this.drawing.querySelectorAll(".call")) {
        const chosen = calls.has(bar.dataset.call);
        bar.classList.toggle("chosen", chosen);
        bar.setAttribute("aria-pressed", String(chosen));
        bar.setAttribute("tabindex", chosen && first ? "0" : "-1");
        if (chosen) first = false;
      }
      this.thread.textContent = `${thread.name}: ${thread.result}${thread.critical ? ", on the critical path" : ""}`;
      this.write(thread);
      const call = thread.calls.findIndex((one) => one.index === callIndex);
      const top = call > 0 ? this.text.children[call].offsetTop - this.text.offsetTop : 0;
      this.text.scrollTop = top;
    }

    chooseCall(index) {
      const threads = data.rollouts[this.index].threads;
      this.choose(threads.findIndex((thread) => thread.calls.some((call) => call.index === index)), index);
    }

    write(thread) {
      this.value.textContent = "Point at a token, or go there with ← and →, for its log-probability.";
      this.text.replaceChildren(...thread.calls.map((call, number) => {
        const block = element("span", "call");
        const advantage = call.advantage === null ? "" : `, advantage ${signed(call.advantage, 3)}`;
        block.append(element("span", "note", call.note + advantage));
        block.append(element("span", number ? "came" : "context", call.context));
        call.tokens.forEach((id, place) => {
          const logprob = call.logprobs === null ? null : call.logprobs[place];
          const level = logprob === null ? 0 : SURPRISES.filter((least) => -logprob >= least).length;
          const token = element("span", `token s${level}${place < call.kept ? "" : " gone"}`, data.tokens[id]);
          const told = [JSON.stringify(data.tokens[id])];
          if (logprob !== null) told.push(`log-probability ${signed(logprob, 3)} (${(100 * Math.exp(logprob)).toFixed(1)} %)`);
          if (call.advantage !== null) told.push(`advantage ${signed(call.advantage, 3)}`);
          if (place >= call.kept) told.push("not in the context of the next call: the join took its place");
          token.dataset.value = told.join(" · ");
          block.append(token);
        });
        return block;
      }));
    }

    showValue(token) {
      this.text.querySelector(".current")?.classList.remove("current");
      token.classList.add("current");
      this.value.textContent = token.dataset.value;
    }

    moveThread(event) {
      const count = data.rollouts[this.index].threads.length;
      const places = { ArrowDown: this.number + 1, ArrowUp: this.number - 1, Home: 0, End: count - 1, Enter: this.number, " ": this.number };
      if (!(event.key in places)) return;
      event.preventDefault();
      this.choose(Math.min(count - 1, Math.max(0, places[event.key])));
      this.drawing.querySelector('.call[tabindex="0"]').focus();
    }

    moveToken(event) {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const tokens = [...this.text.querySelectorAll(".token")];
      if (!step || !tokens.length) return;
      event.preventDefault();
      const now = tokens.findIndex((token) => token.classList.contains("current"));
      const next = tokens[now < 0 ? 0 : Math.min(tokens.length - 1, Math.max(0, now + step))];
      this.showValue(next);
      next.scrollIntoView({ block: "nearest" });
    }
  }

  const left = new Pane("left");
  const right = new Pane("right");
  const labels = [...new Set(data.rollouts.map((rollout) => rollout.label))];
  const options = (select, pairs) => select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  let shown = []; // indices of the rollouts that the filter lets through
  let place = 0; // in `shown`

  const passes = (rollout) => {
    const wanted = control("filter").value;
    return wanted === "" || (wanted === "failed" ? !rollout.correct : rollout.verdict === wanted.slice(1));
  };
  /* The rollouts of the left label that the filter lets through; `key` is the problem to stay at. */
  const list = (key) => {
    const all = data.rollouts.map((rollout, index) => [rollout, index]);
    const own = all.filter(([rollout]) => rollout.label === control("left").value);
    shown = own.filter(([rollout]) => passes(rollout)).map(([, index]) => index);
    options(control("rollout"), shown.map((index, at) => {
      const { name, correct, verdict } = data.rollouts[index];
      return [at, `${correct ? "✓" : "✗"} ${name}${correct ? "" : `: ${verdict}`}`];
    }));
    place = Math.max(0, shown.findIndex((index) => data.rollouts[index].key === key));
    show();
  };
  /* What to begin with: a problem that was solved with children, where there is one. */
  const telling = () => data.rollouts.find(({ label, correct, threads }) =>
    label === control("left").value && correct && threads.length > 2)?.key;
  const listVerdicts = () => {
    const own = data.rollouts.filter((rollout) => rollout.label === control("left").value);
    const verdicts = [...new Set(own.map((rollout) => rollout.verdict))].sort();
    options(control("filter"), [["", "all"], ["failed", "those that failed"], ...verdicts.map((verdict) => [`=${verdict}`, verdict])]);
  };
  const show = () => {
    const beside = control("right").value;
    const index = shown[place];
    left.root.hidden = index === undefined;
    right.root.hidden = beside === "" || index === undefined;
    document.body.classList.toggle("comparing", !right.root.hidden);
    const failed = shown.filter((at) => !data.rollouts[at].correct).length;
    control("count").textContent = shown.length ? `${place + 1} of ${shown.length}, ${failed} failed` : "none";
    if (index === undefined) return;
    control("rollout").value = String(place);
    left.show(index);
    if (right.root.hidden) return;
    const twin = data.rollouts.findIndex((one) => one.label === beside && one.key === data.rollouts[index].key);
    right.show(twin < 0 ? undefined : twin);
  };
  const key = () => data.rollouts[shown[place]]?.key;
  const step = (by) => {
    if (!shown.length) return;
    place = (place + by + shown.length) % shown.length;
    show();
  };
  /* To the next one in that direction that failed, round the end; stays where none did. */
  const stepFailed = (by) => {
    for (let steps = 1; steps <= shown.length; steps++) {
      const at = (place + by * steps + shown.length * steps) % shown.length;
      if (!data.rollouts[shown[at]].correct) { place = at; show(); return; }
    }
  };
  const sideBySide = () => {
    const others = labels.filter((label) => label !== control("left").value);
    control("right").value = control("right").value || !others.length ? "" : others[0];
    show();
  };

  options(control("left"), labels.map((label) => [label, label]));
  options(control("right"), [["", "nothing"], ...labels.map((label) => [label, label])]);
  listVerdicts();
  list(telling());
  control("left").addEventListener("change", () => { const at = key(); listVerdicts(); list(at); });
  control("right").addEventListener("change", show);
  control("filter").addEventListener("change", () => list(key()));
  control("rollout").addEventListener("change", (event) => { place = Number(event.target.value); show(); });
  control("previous").addEventListener("click", () => step(-1));
  control("next").addEventListener("click", () => step(1));
  control("next-failed").addEventListener("click", () => stepFailed(1));
  const keys = { n: () => step(1), p: () => step(-1), f: () => stepFailed(1), F: () => stepFailed(-1), c: sideBySide };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("select, input, textarea");
    if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey && event.key in keys) keys[event.key]();
  });
})();
