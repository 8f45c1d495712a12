"use strict";
// Comfort only: without this script every video plays, every value has a tooltip, all is readable.
(() => {
  document.documentElement.classList.add("scripted");
  const SVG = "http://www.w3.org/2000/svg";
  const make = (parent, name, attributes = {}) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return parent.appendChild(node);
  };
  const readable = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toPrecision(4);
    return value.toLocaleString("en", { maximumSignificantDigits: 5 });
  };

  // Charts: a cursor on the nearest recorded step, with every curve's value there.
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] < steps[high] - step ? low : high;
  };
  for (const chart of document.querySelectorAll("figure.chart")) {
    const { across: counted, plot: [left, top, width, height], x: [first, last], y: [low, high, log], curves } =
      JSON.parse(chart.dataset.chart);
    const svg = chart.querySelector("svg");
    svg.querySelector(".columns").remove();
    svg.querySelector("title").remove();
    const overlay = make(svg, "g", { visibility: "hidden" });
    const cursor = make(overlay, "line", { class: "cursor", y1: top, y2: top + height });
    const points = curves.map((curve) => make(overlay, "circle", { class: `point ${curve.look.split(" ")[0]}`, r: 4.5 }));
    const tip = chart.appendChild(document.createElement("div"));
    tip.className = "tip";
    tip.hidden = true;
    const across = (step) => left + (step - first) / (last - first) * width;
    const down = (value) => {
      const share = log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      return top + (1 - share) * height;
    };
    const hide = () => { tip.hidden = true; overlay.setAttribute("visibility", "hidden"); };
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      const unit = box.width / svg.viewBox.baseVal.width;
      const wanted = first + ((event.clientX - box.left) / unit - left) / width * (last - first);
      const main = curves[curves.length - 1];
      const step = main.steps[nearest(main.steps, wanted)];
      const place = across(step);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      tip.replaceChildren();
      const heading = tip.appendChild(document.createElement("b"));
      heading.textContent = `${counted} ${step.toLocaleString("en")}`;
      curves.forEach((curve, i) => {
        const index = nearest(curve.steps, step);
        const value = curve.values[index];
        points[i].setAttribute("visibility", value === null ? "hidden" : "inherit");
        if (value !== null) {
          points[i].setAttribute("cx", across(curve.steps[index]));
          points[i].setAttribute("cy", down(value));
        }
        const row = tip.appendChild(document.createElement("div"));
        const swatch = row.appendChild(document.createElement("span"));
        swatch.textContent = "● ";
        swatch.className = "key";
        swatch.style.color = getComputedStyle(points[i]).fill;
        row.append(curves.length > 1 ? `${curve.name} ${readable(value)}` : readable(value));
      });
      tip.hidden = false;
      overlay.setAttribute("visibility", "visible");
      const at = box.left - chart.getBoundingClientRect().left + place * unit;
      const flip = at + tip.offsetWidth + 24 > chart.clientWidth;
      tip.style.left = `${Math.max(0, flip ? at - tip.offsetWidth - 12 : at + 12)}px`;
      tip.style.top = `${svg.getBoundingClientRect().top - chart.getBoundingClientRect().top + 8}px`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }

  // Samples: show all, those that are right, or those that fail one question.
  for (const group of document.querySelectorAll(".filters")) {
    const gallery = group.closest(".gallery");
    const cards = [...gallery.querySelectorAll(".card")];
    const fits = (card, choice) => {
      if (choice === "all") return true;
      if (choice === "right") return card.dataset.right === "true";
      return (card.dataset.wrong || "").split(" ").includes(choice.slice("wrong:".length));
    };
    group.addEventListener("click", (event) => {
      const choice = event.target.dataset.filter;
      if (!choice) return;
      for (const button of group.children) button.setAttribute("aria-pressed", button === event.target);
      for (const card of cards) card.hidden = !fits(card, choice);
      const more = gallery.querySelector("details.more");
      if (more) more.open = choice !== "all";
    });
  }

  // Videos: play those on the screen, all in the pace of the reader.
  const videos = [...document.querySelectorAll("video")];
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let playing = !calm;
  const onScreen = new Set();
  const settle = (video) => {
    if (playing && onScreen.has(video)) video.play().catch(() => {}); else video.pause();
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) onScreen.add(entry.target); else onScreen.delete(entry.target);
      settle(entry.target);
    }
  }, { rootMargin: "80px" });
  for (const video of videos) watcher.observe(video);
  if (videos.length) {
    const button = document.createElement("button");
    const label = () => { button.textContent = playing ? "❚❚ pause videos" : "▶ play videos"; };
    button.type = "button";
    button.addEventListener("click", () => { playing = !playing; label(); videos.forEach(settle); });
    label();
    document.querySelector("nav").append(button);
  }

  // A closer look.
  const dialog = document.body.appendChild(document.createElement("dialog"));
  dialog.addEventListener("click", () => dialog.close());
  for (const video of document.querySelectorAll(".card video:not([controls]), .learning video:not([controls])")) {
    const open = () => {
      const large = video.cloneNode();
      large.removeAttribute("role");
      large.removeAttribute("tabindex");
      large.muted = true;
      const words = document.createElement("p");
      words.textContent = video.getAttribute("aria-label");
      dialog.replaceChildren(large, words);
      dialog.showModal();
      if (!calm) large.play().catch(() => {});
    };
    video.setAttribute("role", "button");
    video.tabIndex = 0;
    video.addEventListener("click", open);
    video.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); }
    });
  }
})();
