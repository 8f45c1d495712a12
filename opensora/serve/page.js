"use strict";
// Asks /v1/videos and shows what it answers. All text becomes text nodes, so no prompt is markup.
(() => {
  const at = (id) => document.getElementById(id);
  const ask = at("ask"), key = at("key"), gallery = at("gallery"), more = at("more");
  const cards = new Map(); // id -> {job, node, show}
  const PAGE = 24, SOON = 700, AWAY = 2000, LATER = 10000;
  let shown = PAGE, timer = 0, turn = 0, greeted = false, away = false;
  let token = sessionStorage.getItem("opensora-token") || "";

  const make = (parent, name, text = "", className = "") => {
    const node = parent.appendChild(document.createElement(name));
    node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const call = async (path, options = {}) => {
    const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
    const answer = await fetch(path, { ...options, headers, credentials: "omit" })
      .catch(() => { throw new Error("the server does not answer"); });
    if (answer.ok) return answer;
    const told = await answer.json().then((body) => body.error, () => null);
    if (answer.status === 401) key.hidden = false;
    const error = new Error(told ? told.message : `the server answered ${answer.status}`);
    error.status = answer.status;
    throw error;
  };
  const say = (error) => { at("refusal").textContent = error ? error.message : ""; };

  // One card a job. What changes while a job runs is written again, a video is made once.
  const state = (job) => {
    if (job.status === "completed") return ["", ""];
    if (job.status === "failed") return ["failed", job.error ? job.error.message : ""];
    if (job.status === "in_progress") return [`step ${job.step} of ${job.steps}`, job.step === job.steps ? "writing the video" : "drawing"];
    return ["waits", job.queue_position ? `${job.queue_position} before it` : "next in line"];
  };
  const content = async (job) => {
    const path = `/v1/videos/${job.id}/content`;
    return token ? URL.createObjectURL(await (await call(path)).blob()) : path;
  };
  const deed = (parent, label, act) => {
    const button = make(parent, "button", label);
    button.type = "button";
    button.addEventListener("click", () => act(button).catch(say));
    return button;
  };
  const create = (job) => {
    const node = document.createElement("article");
    node.className = "card";
    node.dataset.id = job.id;
    const stage = make(node, "div", "", "stage");
    const [width, height] = job.size.split("x");
    stage.style.aspectRatio = `${width} / ${height}`;
    const words = make(stage, "p"), big = make(words, "b"), small = make(words, "span");
    const bar = make(stage, "progress");
    make(node, "p", job.prompt, "prompt");
    const facts = [`seed ${job.seed}`, job.size, `${job.num_frames} frames`, `${job.fps} fps`, `${job.steps} steps`, `guidance ${job.guidance_scale}`];
    const badges = make(node, "p", "", "badges");
    for (const fact of job.has_input_reference ? [...facts, "from a picture"] : facts) make(badges, "span", fact, "badge");
    const deeds = make(node, "p", "", "deeds"), command = make(node, "code", job.command);
    command.hidden = true;
    deed(deeds, "again", async () => fill(job));
    deed(deeds, "command", async (button) => {
      command.hidden = !command.hidden;
      button.setAttribute("aria-pressed", String(!command.hidden));
    });
    const leave = deed(deeds, "cancel", async () => {
      await call(`/v1/videos/${job.id}`, { method: "DELETE" }).catch((error) => { if (error.status !== 404) throw error; });
      drop(job.id);
      await refresh();
    });
    let done = false, link = null;
    const show = (now) => {
      const [title, detail] = state(now), open = now.status === "queued" || now.status === "in_progress";
      big.textContent = title;
      small.textContent = detail;
      bar.hidden = !open;
      bar.max = now.steps + 1;
      bar.value = now.step;
      leave.textContent = open ? "cancel" : "remove";
      node.classList.toggle("failed", now.status === "failed");
      if (now.status !== "completed" || done) return;
      done = true;
      content(now).then((url) => {
        const video = document.createElement("video");
        Object.assign(video, { src: url, muted: true, loop: true, autoplay: true, controls: Number(width) > 200, playsInline: true });
        if (Number(width) < 200) video.className = "pixelated";
        video.addEventListener("error", () => {
          stage.replaceChildren(words, bar);
          small.textContent = "the video did not come; it is asked for again";
          done = false;
        });
        stage.replaceChildren(video);
        link ||= make(deeds, "a", "mp4");
        link.href = url;
        link.download = `${now.id}.mp4`;
      }).catch((error) => { small.textContent = error.message; done = false; });
    };
    return { job, node, show };
  };
  const drop = (id) => {
    const card = cards.get(id);
    if (!card) return;
    const video = card.node.querySelector("video");
    if (video && video.src.startsWith("blob:")) URL.revokeObjectURL(video.src);
    card.node.remove();
    cards.delete(id);
    at("empty").hidden = cards.size > 0;
  };
  const list = async () => {
    const found = [];
    let after = "", further = true;
    while (further && found.length < shown) {
      const page = await (await call(`/v1/videos?limit=${Math.min(100, shown - found.length)}${after}`)).json();
      found.push(...page.data);
      further = page.has_more;
      after = `&after=${page.last_id}`;
    }
    more.hidden = !further;
    return found;
  };
  const refresh = async () => {
    clearTimeout(timer);
    const own = ++turn; // an answer that a newer question has overtaken is not shown
    let wait = LATER;
    try {
      if (!greeted) await greet();
      const found = await list(), ids = new Set(found.map((job) => job.id));
      if (own !== turn) return;
      if (away) say(null);
      away = false;
      for (const id of [...cards.keys()]) if (!ids.has(id)) drop(id);
      found.forEach((job, index) => {
        const card = cards.get(job.id) || create(job);
        cards.set(job.id, card);
        card.show(job);
        if (gallery.children[index] !== card.node) gallery.insertBefore(card.node, gallery.children[index] || null);
        if (job.status === "queued" || job.status === "in_progress") wait = SOON;
      });
      at("empty").hidden = found.length > 0;
    } catch (error) {
      if (own !== turn) return;
      if (error.status !== 401 || token) say(error);
      if (error.status === 401) return;
      away = true;
      greeted = false;
      wait = AWAY;
    }
    timer = setTimeout(refresh, wait);
  };

  // The form: defaults and bounds are the model's.
  const fill = (values) => {
    for (const input of ask.elements) {
      if (input.name && input.type !== "file" && values[input.name] !== undefined) input.value = values[input.name];
    }
    at("prompt").focus();
  };
  const greet = async () => {
    const model = (await (await call("/v1/models")).json()).data[0];
    const { defaults, bounds, multiples } = model, fields = ask.elements;
    const most = bounds.num_frames - (bounds.num_frames - 1) % multiples.num_frames;
    const sides = [...new Set([multiples.width, multiples.height])].join(" and ");
    document.title = `${model.id} · opensora`;
    at("model").textContent = model.id;
    at("about").textContent = `Trained on ${defaults.num_frames} frames of ${defaults.size} at ${defaults.fps} a second. ` +
      `Sides are multiples of ${sides}, frames one more than a multiple of ${multiples.num_frames}; up to ${most} frames and ${bounds.steps} steps.`;
    for (const [name, value] of Object.entries(defaults)) if (!fields[name].value) fields[name].value = value;
    fields.num_frames.max = most;
    fields.num_frames.step = multiples.num_frames;
    fields.steps.max = bounds.steps;
    fields.guidance_scale.max = bounds.guidance_scale;
    fields.fps.max = bounds.fps;
    fields.prompt.maxLength = bounds.prompt;
    key.hidden = greeted = true;
  };
  const body = () => {
    const form = new FormData(), picture = ask.elements.input_reference.files[0];
    for (const input of ask.elements) if (input.name && input.type !== "file" && input.value !== "") form.append(input.name, input.value);
    if (picture) form.append("input_reference", picture);
    return form;
  };
  ask.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = ask.querySelector(".go");
    button.disabled = true;
    say(null);
    try {
      await call("/v1/videos", { method: "POST", body: body() });
      await refresh();
    } catch (error) { say(error); }
    button.disabled = false;
  });
  ask.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask.requestSubmit();
  });
  key.addEventListener("submit", (event) => {
    event.preventDefault();
    token = at("token").value.trim();
    sessionStorage.setItem("opensora-token", token);
    at("token").value = "";
    say(null);
    greeted = false;
    refresh();
  });
  more.addEventListener("click", () => { shown += PAGE; refresh(); });
  refresh();
})();
