// The page. It gets all its information from the REST API, as any other program would.

const API = "api/v1/";
const KINDS = { videos: "video", images: "image" };
const SIZES = ["4x", "2x", "3x", "720p", "1080p", "1440p", "2160p"];
const QUALITY = { exact: "Exact", balanced: "Balanced: faster, with nearly the same result", fast: "Fast: an approximation" };
// Options that other fields of the form already set, or that apply only to folders of pictures.
const ELSEWHERE = ["scale", "short_edge", "rate"];
const OF_VIDEOS = ["start", "end", "stream", "codec", "crf", "pix_fmt", "scene_cut", "segment_frames", "audio"];
const ACTIVE = ["queued", "running"];

const byId = (id) => document.getElementById(id);
let capabilities, models, unique = 0;
const watched = {}; // the task that each kind's panel shows

// ---- small helpers

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

function notice(text, bad = false) {
  const element = byId("notice");
  element.textContent = text;
  element.classList.toggle("bad", bad);
}

async function ask(path, options = {}) {
  const answer = await fetch(API + path, options);
  if (answer.status === 401 && path !== "session") {
    await login();
    return ask(path, options);
  }
  const told = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error(told.detail);
  return told;
}

const send = (path, body, method = "POST") =>
  ask(path, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

let entering = null;
function login() {
  entering ??= new Promise((done) => {
    const dialog = byId("login");
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await send("session", { token: byId("token").value });
        dialog.close();
        entering = null;
        done();
      } catch (error) {
        byId("login-problem").textContent = error.message;
      }
    };
    dialog.showModal();
  });
  return entering;
}

function duration(seconds) {
  if (seconds == null) return "";
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.round(seconds) % 60];
  return parts[0] ? `${parts[0]} h ${parts[1]} min` : parts[1] ? `${parts[1]} min ${parts[2]} s` : `${parts[2]} s`;
}

const words = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;

function taskId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function field(label, control, hint) {
  control.id ||= `field-${++unique}`;
  const told = hint ? make("small", { id: `${control.id}-hint` }, hint) : null;
  if (told) control.setAttribute("aria-describedby", told.id);
  const name = make("label", { for: control.id }, label);
  return control.type === "checkbox"
    ? make("div", { className: "field" }, control, name, told)
    : make("div", { className: "field" }, name, control, told);
}

const choice = (pairs) => make("select", {}, ...pairs.map(([value, text]) => make("option", { value }, text)));

// ---- tabs

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(tab, focus = false) {
  for (const each of tabs) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", chosen);
    each.tabIndex = chosen ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (tab.id === "tab-jobs") showJobs();
  if (tab.id === "tab-compare") showCompare();
}

for (const [index, tab] of tabs.entries()) {
  tab.onclick = () => show(tab);
  tab.onkeydown = (event) => {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(tabs[(to + tabs.length) % tabs.length], true);
  };
}

// ---- before and after, with a slider

function comparison(before, after, labels = ["Before", "After"]) {
  after.classList.add("after");
  const layers = make("div", { className: "layers" }, before, after,
    make("span", { className: "edge" }),
    make("span", { className: "tag left" }, labels[0]), make("span", { className: "tag right" }, labels[1]));
  const slider = make("input", { type: "range", min: 0, max: 100, step: 0.5, value: 50 });
  slider.setAttribute("aria-label", "Divider between before and after");
  slider.oninput = () => layers.style.setProperty("--at", `${slider.value}%`);
  layers.onpointermove = (event) => {
    if (event.pointerType === "mouse" && !event.buttons) return;
    const box = layers.getBoundingClientRect();
    slider.value = (100 * (event.clientX - box.left)) / box.width;
    slider.oninput();
  };
  return make("div", {}, layers, slider);
}

function previewViewer() {
  const halves = [make("canvas"), make("canvas")];
  const viewer = comparison(...halves, ["Before (bicubic)", "After"]);
  for (const [index, text] of ["The newest frame, enlarged", "The newest frame, upscaled"].entries()) {
    halves[index].setAttribute("role", "img");
    halves[index].setAttribute("aria-label", text);
  }
  viewer.hidden = true;
  let shown = null;
  viewer.update = async (url, version) => {
    if (!version || version === shown) return;
    shown = version;
    const picture = make("img", { src: `${url}?v=${version}` });
    try { await picture.decode(); } catch { return; }
    const width = picture.naturalWidth / 2;
    for (const [index, canvas] of halves.entries()) {
      canvas.width = width;
      canvas.height = picture.naturalHeight;
      canvas.getContext("2d").drawImage(picture, -index * width, 0);
    }
    viewer.hidden = false;
    viewer.dataset.version = version;
  };
  return viewer;
}

// ---- the form of a new job

const WAN = ["flashvsr", "swiftvr"], DIFFVSR = ["diffvsr"];
const OF_FAMILIES = { attention: WAN, flow: DIFFVSR, provider: DIFFVSR, quantize: DIFFVSR, runtime: DIFFVSR };

function optionControl(name, rule) {
  const types = [rule.type].flat();
  if (rule.enum) {
    const values = rule.enum.filter((value) => value !== null);
    const control = choice(values.map((value) => [JSON.stringify(value), String(value)]));
    if (rule.default === null) control.prepend(make("option", { value: "" }, "default"));
    control.value = rule.default === null ? "" : JSON.stringify(rule.default);
    control.read = () => (control.value === "" ? null : JSON.parse(control.value));
    return control;
  }
  if (types.includes("boolean")) {
    const control = make("input", { type: "checkbox", checked: rule.default });
    control.read = () => control.checked;
    return control;
  }
  const number = !types.includes("string") && (types.includes("integer") || types.includes("number"));
  const control = make("input", { type: number ? "number" : "text", value: rule.default ?? "", placeholder: "default" });
  if (number) {
    control.step = types.includes("integer") ? 1 : "any";
    // Above this limit, browsers cannot represent every whole number.
    if (Math.abs(rule.minimum) < 2 ** 53) control.min = rule.minimum;
    if (Math.abs(rule.maximum) < 2 ** 53) control.max = rule.maximum;
  }
  control.read = () => (control.value === "" ? rule.default : number ? Number(control.value) : control.value);
  return control;
}

function options(kind, family, remembered) {
  const parts = [capabilities.families[family], capabilities.job, capabilities.loader];
  const found = {}, plain = [], expert = [];
  for (const part of parts) {
    for (const [name, rule] of Object.entries(part.schema.properties)) {
      const hidden = ELSEWHERE.includes(name) || (kind === "images" && OF_VIDEOS.includes(name));
      if (hidden || found[name] || !part.options[name]) continue;
      if (part === capabilities.loader && !(OF_FAMILIES[name] ?? [family]).includes(family)) continue;
      const control = (found[name] = optionControl(name, rule));
      control.usual = JSON.stringify(control.read());
      if (name in remembered) {
        if (control.type === "checkbox") control.checked = remembered[name];
        else control.value = rule.enum ? JSON.stringify(remembered[name]) : remembered[name];
      }
      (part.options[name].expert ? expert : plain).push(field(words(name), control, rule.description));
    }
  }
  const element = make("div", {},
    make("details", {}, make("summary", {}, "More options"), ...plain),
    make("details", {}, make("summary", {}, "For experts"), ...expert));
  element.read = () => Object.fromEntries(Object.entries(found)
    .filter(([, control]) => JSON.stringify(control.read()) !== control.usual)
    .map(([name, control]) => [name, control.read()]));
  return element;
}

function remember(kind, request) {
  try { localStorage.setItem(`stream-diffvsr-${kind}`, JSON.stringify(request)); } catch { /* not allowed here */ }
}

function remembered(kind) {
  try { return JSON.parse(localStorage.getItem(`stream-diffvsr-${kind}`)) ?? {}; } catch { return {}; }
}

function jobForm(kind, viewer) {
  const last = remembered(kind), word = KINDS[kind];
  const file = make("input", { type: "file" });
  file.accept = kind === "images" ? capabilities.source_suffixes.images.join() : "video/*,.mkv,.ts,.m2ts,.gif,.webp";
  const drop = make("div", { className: "file" }, field(`The ${word}`, file, `Choose a file of up to ${gigabytes(capabilities.limits.max_bytes)}, or drop one here.`));
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    file.files = event.dataTransfer.files;
  };
  const elsewhere = [capabilities.paths && "a path on the server", capabilities.s3 && "s3://bucket/key"].filter(Boolean);
  const source = make("input", { type: "text" }), target = make("input", { type: "text", placeholder: "s3://bucket/key" });
  const model = choice(models.map((each) => [each.name, `${each.name} (${each.title})` + (each.here ? "" : `: ${each.download_gigabytes} GB to download`)]));
  const preset = make("select"), size = choice(SIZES.map((text) => [text, text.endsWith("p") ? `${text} (short edge)` : text]));
  const format = choice([["", "same as the source"], ...capabilities.formats[kind].map((text) => [text, text.slice(1)])]);
  const own = make("div");
  const change = () => {
    const chosen = models.find((each) => each.name === model.value);
    const presets = capabilities.families[chosen.family].presets, before = preset.value;
    preset.replaceChildren(...presets.map((value) => make("option", { value }, QUALITY[value] ?? words(value))));
    preset.value = presets.includes(before) ? before : presets[0];
    own.replaceChildren(options(kind, chosen.family, chosen.name === last.model ? last.options ?? {} : {}));
  };
  const pick = (control, value) => { if ([...control.options].some((each) => each.value === value)) control.value = value; };
  pick(model, last.model);
  model.onchange = change;
  change();
  pick(preset, last.preset);
  pick(size, last.size);
  pick(format, last.format ?? "");
  const start = make("button", { className: "main" }, "Upscale");
  const sent = make("progress", { max: 1, value: 0, hidden: true });
  sent.setAttribute("aria-label", "Upload");
  const form = make("form", { className: "card", noValidate: false },
    make("h2", {}, kind === "videos" ? "Upscale a video" : "Upscale an image"), drop,
    field("Model", model, "nano is small and comes with the service; the other models are downloaded when they are first used."),
    field("Quality", preset), field("Size", size), field("Format", format),
    elsewhere.length ? make("details", {}, make("summary", {}, "Other sources and targets"),
      field("Source", source, `Enter ${elsewhere.join(" or ")} instead of choosing a file.`),
      capabilities.s3 ? field("Target", target, "The result is also uploaded to this address. You can still download it on this page.") : null) : null,
    own, start, sent);
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (!file.files.length && !source.value) return notice(`Choose the ${word} first.`, true);
    start.disabled = true;
    try {
      const request = { model: model.value, preset: preset.value, size: size.value, format: format.value || null, options: own.firstChild.read() };
      remember(kind, request);
      if (target.value) request.target = target.value;
      request.download = models.find((each) => each.name === model.value).here === false;
      notice("Uploading the file.");
      const id = source.value ? taskId() : await upload(kind, file.files[0], sent);
      if (source.value) request.source = source.value;
      notice("The server is checking the file.");
      watch(kind, await send(`${kind}/${id}/upscaling`, request), viewer);
      notice("The job is in the queue.");
    } catch (error) {
      notice(error.message, true);
    }
    start.disabled = false;
    sent.hidden = true;
  };
  return form;
}

function upload(kind, file, progress) {
  progress.hidden = false;
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest(), form = new FormData();
    form.append("file", file);
    request.upload.onprogress = (event) => { progress.value = event.loaded / event.total; };
    request.onerror = () => failed(new Error("The upload was interrupted."));
    request.onload = () => {
      const told = JSON.parse(request.responseText || "{}");
      request.status === 201 ? done(told.task_id) : failed(new Error(told.detail ?? "The upload failed."));
    };
    request.open("POST", `${API}${kind}/upload`);
    request.send(form);
  });
}

// ---- the job being watched

function numbers(task) {
  const count = task.frames_total ? `${task.frames_done} of ${task.frames_total} frames` : `${task.frames_done} frames`;
  const waits = task.position ? `${task.position} ahead in the queue` : "next in line";
  return [
    { queued: `Waiting, ${waits}`, running: "Running", finished: "Finished", failed: "Failed", cancelled: "Cancelled", uploaded: "Uploaded" }[task.status],
    count,
    task.fps ? `${task.fps.toFixed(task.fps < 1 ? 3 : 1)} frames per second` : "",
    task.status === "running" && task.seconds_left != null ? `${duration(task.seconds_left)} left` : "",
    task.size && task.output_size ? `${task.size.join("x")} to ${task.output_size.join("x")}` : "",
    task.device ?? "",
  ].filter(Boolean).map((text) => make("span", {}, text));
}

function actions(task, changed) {
  const path = `${task.kind}/${task.task_id}`, name = task.name;
  const button = (text, act) => {
    const made = make("button", { type: "button", onclick: async () => {
      made.disabled = true;
      try { await act(); } catch (error) { notice(error.message, true); }
      changed();
    } }, text);
    made.setAttribute("aria-label", `${text}: ${name}`);
    return made;
  };
  const link = (text, href) => {
    const made = make("a", { className: "button", href }, text);
    made.setAttribute("aria-label", `${text}: ${name}`);
    return made;
  };
  const request = Object.fromEntries(Object.entries(task.request).filter(([, value]) => value !== null));
  const partly = task.status === "cancelled" ? "Download the finished part" : "Download";
  return [
    task.has_result ? link(partly, `${API}${path}/result?download=true`) : null,
    task.status === "finished" ? button("Compare", () => { compareTask = task; show(byId("tab-compare"), true); }) : null,
    ACTIVE.includes(task.status) ? button("Cancel", () => ask(path, { method: "DELETE" })) : null,
    ["failed", "cancelled"].includes(task.status) ? button(task.status === "failed" ? "Retry" : "Continue", () => send(`${path}/upscaling`, request)) : null,
    ACTIVE.includes(task.status) ? null : button("Remove", () => ask(`${path}?remove=true`, { method: "DELETE" })),
  ].filter(Boolean);
}

function taskView() {
  const title = make("h2"), bar = make("progress", { max: 1 }), facts = make("div", { className: "numbers" });
  const message = make("p", { className: "message" }), row = make("div", { className: "row" });
  bar.setAttribute("aria-label", "Frames done");
  const element = make("div", {}, title, bar, facts, message, row);
  let last = "";
  element.update = (task, changed) => {
    title.textContent = task.name;
    bar.hidden = !ACTIVE.includes(task.status);
    if (task.frames_total && task.status === "running") bar.value = task.frames_done / task.frames_total;
    else bar.removeAttribute("value");
    if (task.status === "queued") bar.value = 0;
    facts.replaceChildren(...numbers(task));
    facts.firstChild.className = { failed: "bad", finished: "good" }[task.status] ?? "";
    message.textContent = task.message;
    message.hidden = !task.message;
    // Keep the buttons while the state is unchanged, so that the keyboard focus is not lost.
    const now = `${task.task_id} ${task.status} ${task.has_result}`;
    if (now !== last) row.replaceChildren(...actions(task, changed));
    last = now;
  };
  return element;
}

function watch(kind, task, place) {
  const mine = (watched[kind] = {}), view = taskView(), preview = previewViewer();
  place.replaceChildren(view, preview);
  let before = task.status;
  const refresh = async () => {
    if (watched[kind] !== mine) return;
    try {
      const now = await ask(`${kind}/${task.task_id}/status`);
      view.update(now, refresh);
      preview.update(`${API}${kind}/${task.task_id}/preview.jpg`, now.preview);
      if (now.status !== before) notice(`${now.name}: ${now.status}.`, now.status === "failed");
      before = now.status;
      clearTimeout(mine.timer);
      mine.timer = setTimeout(refresh, ACTIVE.includes(now.status) ? 1000 : 5000);
    } catch (error) {
      // Either the job was removed, or the server is unavailable for a moment.
      if (/no task/.test(error.message)) return place.replaceChildren(make("p", { className: "empty" }, "The job was removed."));
      mine.timer = setTimeout(refresh, 3000);
    }
  };
  view.update(task, refresh);
  refresh();
}

// ---- the list of jobs

const allTasks = async () => {
  const lists = await Promise.all(Object.keys(KINDS).map((kind) => ask(`${kind}?limit=100`)));
  return lists.flatMap((list) => list.tasks).sort((a, b) => b.created - a.created);
};

const cards = new Map();
let jobsTimer;
async function showJobs() {
  clearTimeout(jobsTimer);
  const panel = byId("jobs");
  if (panel.hidden) return;
  try {
    const tasks = await allTasks();
    if (!panel.querySelector("ul")) panel.replaceChildren(make("ul", { className: "tasks" }));
    const list = panel.querySelector("ul");
    for (const [id, card] of cards) {
      if (tasks.some((task) => task.task_id === id)) continue;
      card.remove();
      cards.delete(id);
    }
    for (const [index, task] of tasks.entries()) {
      if (!cards.has(task.task_id)) {
        const view = taskView(), card = make("li", { className: "card" }, view);
        card.view = view;
        cards.set(task.task_id, card);
      }
      const card = cards.get(task.task_id);
      if (list.children[index] !== card) list.insertBefore(card, list.children[index] ?? null);
      card.view.update(task, showJobs);
    }
    if (!tasks.length) panel.replaceChildren(make("p", { className: "empty" }, "There are no jobs yet."));
  } catch (error) {
    notice(error.message, true);
  }
  jobsTimer = setTimeout(showJobs, 2000);
}

// ---- source and result side by side

let compareTask = null;
async function showCompare() {
  const panel = byId("compare");
  try {
    const done = (await allTasks()).filter((task) => task.status === "finished");
    if (!done.length) return panel.replaceChildren(make("p", { className: "empty" }, "When a job has finished, you can compare its source and result here."));
    const pick = choice(done.map((task) => [task.task_id, task.name]));
    pick.value = compareTask && done.some((task) => task.task_id === compareTask.task_id) ? compareTask.task_id : done[0].task_id;
    const place = make("div");
    const update = () => place.replaceChildren(sideBySide(done.find((task) => task.task_id === pick.value)));
    pick.onchange = update;
    update();
    panel.replaceChildren(make("div", { className: "card" }, field("Job", pick), place));
  } catch (error) {
    notice(error.message, true);
  }
}

function sideBySide(task) {
  const path = `${API}${task.kind}/${task.task_id}`;
  if (task.kind === "images") {
    return comparison(make("img", { src: `${path}/source`, alt: "Before" }), make("img", { src: `${path}/result`, alt: "After" }));
  }
  const shown = (name) => make("video", { src: `${path}/${name}`, muted: true, loop: true, playsInline: true, preload: "auto" });
  const before = shown("source"), after = shown("result");
  before.setAttribute("aria-label", "Before");
  after.setAttribute("aria-label", "After");
  const play = make("button", { type: "button" }, "Play");
  const time = make("input", { type: "range", min: 0, max: 1, step: "any", value: 0 });
  time.setAttribute("aria-label", "Time");
  const problem = make("p", { className: "bad", role: "status" });
  const together = () => { if (Math.abs(before.currentTime - after.currentTime) > 0.05) before.currentTime = after.currentTime; };
  play.onclick = () => {
    const start = after.paused;
    together();
    for (const video of [before, after]) start ? video.play().catch(() => {}) : video.pause();
    play.textContent = start ? "Pause" : "Play";
  };
  after.onloadedmetadata = () => { time.max = after.duration; };
  after.ontimeupdate = () => { time.value = after.currentTime; together(); };
  time.oninput = () => { before.currentTime = after.currentTime = Number(time.value); };
  before.onerror = () => { problem.textContent = "This browser cannot play the source; only the result is shown."; };
  after.onerror = () => { problem.textContent = "This browser cannot play the result: download it instead."; };
  return make("div", {}, comparison(before, after), make("div", { className: "row" }, play), time, problem);
}

// ---- begin

async function begin() {
  notice("Loading the server's options.");
  [capabilities, { models }] = [await ask("capabilities"), await ask("models")];
  for (const kind of Object.keys(KINDS)) {
    const place = make("div", { className: "card" }, make("p", { className: "empty" }, `While the ${KINDS[kind]} is being processed, its newest frame appears here, before and after upscaling.`));
    byId(kind).replaceChildren(make("div", { className: "two" }, jobForm(kind, place), place));
    const { tasks } = await ask(`${kind}?limit=20`);
    const running = tasks.find((task) => task.status === "running") ?? tasks.find((task) => task.status === "queued");
    if (running) watch(kind, running, place);
  }
  byId("machine").textContent = `${capabilities.devices.filter((each) => each.works).map((each) => `${each.title}: ${gigabytes(each.free)} of ${gigabytes(each.total)} free`).join("; ")}. Version ${capabilities.version}.`;
  notice("");
  const tab = tabs.find((each) => `#${each.getAttribute("aria-controls")}` === location.hash);
  if (tab) show(tab);
}

begin().catch((error) => notice(error.message, true));
