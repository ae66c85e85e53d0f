// The page: follows the feed of a policy server, freezes it, steps back through the last minute.

import { drawDimension, drawOverTime, isOutside, timeAt } from "./charts.js";
import { bitmapOf, drawView, gridOf } from "./views.js";

const $ = (id) => document.getElementById(id);
const STAGES = ["queue", "preprocessing", "vision", "pruner", "llm"];
const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
const ACTION_NAMES = { // as `action_names` in prismatic/vla/robots.py
  libero: ["x", "y", "z", "rot x", "rot y", "rot z", "gripper"],
  bridge: ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
};
const GAP_S = 3;
const SETTLED_MS = 600; // a moment that is looked at for so long is worth making its record

const state = {
  moments: [], // of the client that is followed, oldest first; each also holds its pictures where they have come
  client: null,
  frozen: null, // {moments, place} while time stands still
  facts: null,
  status: null,
  record: null, // {number, address or problem} of the moment that is shown frozen
  isLive: false,
};
let feed = null, wanted = 0;

/** Text that came from outside goes in as text, never as markup. */
function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const seconds = () => (state.status ? state.status.time + (performance.now() - state.status.received) / 1000 : Date.now() / 1000);
const shownMoments = () => (state.frozen ? state.frozen.moments : state.moments);
const shownMoment = () => (state.frozen ? state.frozen.moments[state.frozen.place] : state.moments.at(-1)) ?? null;
const number = (value, digits = 1) => (value === undefined || value === null ? "–" : value.toFixed(digits));

// ---- what comes ----

function connect() {
  feed?.close();
  const chosen = $("client").value;
  feed = new EventSource(`/feed${chosen ? `?client=${encodeURIComponent(chosen)}` : ""}`);
  feed.onopen = () => { state.isLive = true; draw(); };
  feed.onerror = () => { state.isLive = false; draw(); if (feed.readyState === EventSource.CLOSED) setTimeout(connect, 2000); };
  feed.addEventListener("history", (event) => {
    const { client, moments } = JSON.parse(event.data);
    const known = new Map(client === state.client ? state.moments.map((one) => [key(one), one]) : []);
    state.client = client;
    state.moments = moments.map((one) => known.get(key(one)) ?? one);
    draw();
  });
  feed.addEventListener("moment", (event) => {
    const { moment, pictures } = JSON.parse(event.data);
    const last = state.moments.at(-1);
    if (last && moment.number <= last.number && moment.time <= last.time) {
      const same = state.moments.find((one) => one.number === moment.number);
      if (same) same.pictures = pictures;
    } else {
      moment.pictures = pictures;
      state.moments.push(moment);
    }
    const oldest = moment.time - (state.facts?.kept_s ?? 60);
    while (state.moments.length && state.moments[0].time < oldest) state.moments.shift();
    draw();
  });
  feed.addEventListener("facts", (event) => { state.facts = JSON.parse(event.data); drawFacts(); draw(); });
  feed.addEventListener("status", (event) => {
    state.status = JSON.parse(event.data);
    state.status.received = performance.now();
    drawClients();
    draw();
  });
}

const key = (moment) => `${moment.number} ${moment.request}`;

// ---- time ----

function freeze(place) {
  if (!state.moments.length && !state.frozen) return;
  if (!state.frozen) state.frozen = { moments: [...state.moments], place: state.moments.length - 1 };
  if (place !== undefined) state.frozen.place = Math.min(Math.max(place, 0), state.frozen.moments.length - 1);
  settle();
  draw();
}

function goLive() {
  state.frozen = null;
  forgetRecord();
  draw();
}

function step(by) {
  freeze((state.frozen ? state.frozen.place : state.moments.length - 1) + by);
}

// ---- records ----

let timer = null;

function forgetRecord() {
  clearTimeout(timer);
  if (state.record?.address) URL.revokeObjectURL(state.record.address);
  state.record = null;
  say("");
}

/** The server keeps a minute, a person may look for longer: the record is fetched as soon as a moment is looked at. */
function settle() {
  const moment = shownMoment();
  if (!moment || state.record?.number === moment.number) return;
  forgetRecord();
  if (state.facts?.has_records) timer = setTimeout(() => fetchRecord(moment), SETTLED_MS);
}

async function fetchRecord(moment) {
  const record = { number: moment.number, address: null, problem: null };
  state.record = record;
  try {
    const answer = await fetch(`/moments/${moment.number}/record`);
    if (answer.ok) record.address = URL.createObjectURL(await answer.blob());
    else record.problem = await reasonOf(answer);
  } catch {
    record.problem = "the server does not answer";
  }
  if (state.record !== record && record.address) URL.revokeObjectURL(record.address);
  return record;
}

async function reasonOf(answer) {
  try {
    const content = await answer.json();
    return String(content.error ?? content.detail ?? answer.status);
  } catch {
    return String(answer.status);
  }
}

async function download() {
  const moment = shownMoment();
  if (!moment) return;
  if (!state.frozen) freeze();
  clearTimeout(timer);
  const record = state.record?.number === moment.number && state.record.address ? state.record : await fetchRecord(moment);
  if (!record.address) { say(`No record of this moment: ${record.problem}.`); return; }
  const link = element("a");
  link.href = record.address;
  link.download = `moment_${moment.number}_${moment.request.replace(/[^\w-]/g, "")}.npz`;
  link.click();
  say(`Saved ${link.download}.`);
}

function say(text) {
  $("said").textContent = text;
  $("said").hidden = !text;
}

// ---- drawing ----

let isDue = false;

function draw() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => { isDue = false; drawNow(); });
}

function drawNow() {
  const moment = shownMoment();
  drawState(moment);
  drawWarnings(moment);
  if (!moment) return;
  drawHead(moment);
  drawCameras(moment);
  drawCharts(moment);
  drawActions(moment);
}

function drawState(moment) {
  const [text, name] = state.frozen ? [`frozen, ${number(Math.max(0, seconds() - moment.time), 0)} s ago`, "frozen"]
    : !state.isLive ? ["no connection to the server", "lost"]
      : moment && seconds() - moment.time < GAP_S ? ["live", "live"] : ["live, nobody asks", ""];
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").className = `badge ${name}`;
  $("freeze").textContent = state.frozen ? "Go live" : "Freeze";
  $("freeze").setAttribute("aria-pressed", String(Boolean(state.frozen)));
  const count = shownMoments().length, place = state.frozen ? state.frozen.place : count - 1;
  $("place").max = String(Math.max(0, count - 1));
  $("place").value = String(Math.max(0, place));
  $("place").disabled = $("freeze").disabled = count === 0;
  $("back").disabled = place <= 0;
  $("forward").disabled = !state.frozen || place >= count - 1;
  $("download").disabled = !moment || !state.facts?.has_records;
}

function drawHead(moment) {
  $("instruction").textContent = moment.instruction || "(an empty instruction)";
  const own = moment.session === moment.client ? "" : ` · episode ${brief(moment.session)}`;
  $("which").textContent = `policy query ${moment.query} · ${moment.client}${own} · ${clock(moment.time)} · ${moment.request}`;
  const parts = (moment.kept_of_camera ?? []).map((count, i) => `${moment.cameras[i]} ${count}`);
  $("kept").textContent = moment.tokens === null ? "The policy does not say what it kept."
    : `${keptOf(moment)} of ${moment.tokens} visual tokens kept${parts.length > 1 ? `: ${parts.join(", ")}` : ""}`;
}

const brief = (name) => (name.length > 24 ? `${name.slice(0, 8)}…` : name); // a UUID says no more
const clock = (time) => new Date(time * 1000).toTimeString().slice(0, 8);
const keptOf = (moment) => moment.kept_of_camera?.reduce((sum, count) => sum + count, 0) ?? null;

function drawWarnings(moment) {
  const refusals = (state.status?.refusals ?? []).slice(-5).reverse();
  const lines = [...(moment?.warnings ?? []), ...refusals.map((one) => `${clock(one.time)} refused (${one.code}): ${one.reason}`)];
  const place = $("warned"), own = moment?.warnings.length ?? 0;
  $("flag").textContent = own === 1 ? "1 warning" : `${own} warnings`;
  $("flag").hidden = !own;
  if (place.dataset.lines === lines.join("\n")) return;
  place.dataset.lines = lines.join("\n");
  place.replaceChildren(...(lines.length ? lines.map((line) => element("p", line, "alert")) : [element("p", "none", "soft")]));
}

function cameraFigure(camera) {
  const figure = element("figure", undefined, "card"), caption = element("figcaption");
  figure.dataset.camera = camera;
  const canvas = element("canvas");
  canvas.setAttribute("role", "img");
  caption.append(element("span", camera), element("span", "", "soft"));
  figure.append(canvas, caption);
  return figure;
}

async function drawCameras(moment) {
  const place = $("cameras");
  if ([...place.children].map((one) => one.dataset.camera).join("\n") !== moment.cameras.join("\n")) {
    place.replaceChildren(...moment.cameras.map(cameraFigure));
    place.dataset.shown = "";
  }
  if (place.dataset.shown === key(moment) || place.dataset.asked === key(moment)) return;
  const turn = ++wanted;
  place.dataset.asked = key(moment);
  const crop = state.facts?.info?.center_crop ? Math.sqrt(state.facts.crop_area) : 1;
  let bitmaps = null;
  try {
    bitmaps = await Promise.all(moment.cameras.map((camera) => pictureOf(moment, camera)));
  } catch {
    if (turn === wanted) say("The pictures of this moment are no longer on the server.");
  }
  if (turn === wanted) {
    moment.cameras.forEach((camera, i) => {
      const figure = place.children[i], count = moment.kept_of_camera?.[i], whole = moment.tokens / moment.cameras.length;
      const text = count === undefined ? "" : `${count} of ${whole} kept`;
      figure.querySelector("figcaption .soft").textContent = text;
      figure.firstChild.setAttribute("aria-label", `${camera}, ${text}`);
      if (bitmaps) drawView(figure.firstChild, bitmaps[i], gridOf(moment, camera), crop);
    });
    place.dataset.shown = key(moment);
  }
  bitmaps?.forEach((bitmap) => bitmap.close());
}

/** A bitmap; moments from before the page was opened have their pictures on the server. */
async function pictureOf(moment, camera) {
  if (moment.pictures?.[camera]) return bitmapOf(moment.pictures[camera]);
  const answer = await fetch(`/moments/${moment.number}/views/${camera}`);
  if (!answer.ok) throw new Error(String(answer.status));
  return createImageBitmap(await answer.blob());
}

function drawLegend(id, entries) {
  const place = $(id);
  if (place.children.length !== entries.length) {
    place.replaceChildren(...entries.map(() => { const one = element("span"); one.append(element("i"), element("span")); return one; }));
  }
  entries.forEach(([colour, text], i) => {
    place.children[i].firstChild.style.background = `var(${colour})`;
    place.children[i].lastChild.textContent = text;
  });
}

function drawCharts(moment) {
  const moments = shownMoments(), times = moments.map((one) => one.time);
  const span = state.facts?.kept_s ?? 60, end = state.frozen ? moments.at(-1).time : Math.max(seconds(), moment.time);
  const shared = { times, end, span, gap: GAP_S, marked: state.frozen ? moment.time : null, endText: state.frozen ? clock(end) : "now" };

  const tokens = moment.cameras.map((camera, i) => [COLOURS[i % 6], camera, (one) => one.kept_of_camera?.[i] ?? null]);
  if (moment.cameras.length > 1) tokens.unshift(["--ink", "all", keptOf]);
  drawLegend("tokens-legend", tokens.map(([colour, name, of]) => [colour, `${name} ${of(moment) ?? "–"}`]));
  drawOverTime($("tokens"), {
    ...shared, least: 10, series: tokens.map(([colour, , of]) => ({ colour, values: moments.map(of) })),
  });

  const stages = STAGES.map((name, i) => [COLOURS[i], name, (one) => one.timing[name] ?? 0]);
  stages.push([COLOURS[5], "rest", restOf]);
  const total = `total ${number(moment.timing.total)} ms`;
  drawLegend("latency-legend", [...stages.map(([colour, name, of]) => [colour, `${name} ${number(of(moment))}`]), ["transparent", total]]);
  drawOverTime($("latency"), {
    ...shared, least: 10, stacked: true, series: stages.map(([colour, , of]) => ({ colour, values: moments.map(of) })),
  });
}

const restOf = (moment) =>
  Math.max(0, (moment.timing.total ?? 0) - STAGES.reduce((sum, name) => sum + (moment.timing[name] ?? 0), 0));

function drawActions(moment) {
  const info = state.facts?.info ?? {}, count = moment.actions[0].length;
  const bounds = info.action_bounds?.low?.length === count ? info.action_bounds : null;
  const names = ACTION_NAMES[info.robot?.name]?.length === count ? ACTION_NAMES[info.robot.name] : null;
  const place = $("actions");
  if (place.children.length !== count) {
    place.replaceChildren(...Array.from({ length: count }, () => {
      const row = element("div");
      row.append(element("span", "", "name"), element("canvas"), element("small"));
      row.lastChild.append(element("b"), element("span"));
      return row;
    }));
  }
  let outside = 0;
  [...place.children].forEach((row, i) => {
    const values = moment.actions.map((action) => action[i]), own = bounds && [bounds.low[i], bounds.high[i]];
    const slack = bounds?.slack?.[i] ?? 0;
    const out = values.filter((value) => isOutside(value, own, slack)).length;
    outside += out;
    row.className = out ? "outside" : "";
    row.children[0].textContent = names ? names[i] : `dimension ${i}`;
    drawDimension(row.children[1], values, own, slack);
    const [b, span] = row.children[2].children;
    b.textContent = `${short(Math.min(...values))} … ${short(Math.max(...values))}${out ? `, ${out} out` : ""}`;
    span.textContent = own ? `bounds ${short(own[0])} … ${short(own[1])}` : "no bounds known";
  });
  $("actions-note").textContent = `${moment.actions.length} actions of ${count} dimensions; shaded: the training data's bounds; `
    + (outside ? `${outside} value${outside > 1 ? "s" : ""} outside, red` : "nothing outside");
}

function short(value) {
  const text = value.toFixed(Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

function drawClients() {
  const { clients, answered, refused, not_shown: notShown, time } = state.status;
  $("clients").replaceChildren(...clients.map((one) => {
    const row = element("tr", undefined, `${one.is_open ? "" : "gone"} ${one.name === state.client ? "shown" : ""}`);
    const age = one.answered ? `${number(Math.max(0, time - one.last), 0)} s` : "–";
    row.append(element("td", one.name), element("td", one.address || "–"),
      element("td", !one.session || one.session === one.name ? "–" : brief(one.session)), element("td", String(one.answered), "number"),
      element("td", one.is_open && one.answered ? `${age} ago` : one.is_open ? age : `gone, ${age}`, "number"));
    row.children[1].title = one.address || "";
    row.children[2].title = one.session || "";
    return row;
  }));
  $("counts").textContent = `${answered} answered, ${refused} refused`
    + (notShown ? `; ${notShown} came faster than this page shows` : "");
  const select = $("client"), names = clients.map((one) => one.name);
  if (select.value && !names.includes(select.value)) names.push(select.value);
  if (document.activeElement !== select && [...select.options].slice(1).map((one) => one.value).join("\n") !== names.join("\n")) {
    const chosen = select.value;
    select.replaceChildren(select.options[0], ...names.map((name) => { const one = element("option", name); one.value = name; return one; }));
    select.value = chosen;
  }
}

function drawFacts() {
  const info = state.facts.info, policy = info.policy ?? {}, robot = info.robot ?? {};
  const rows = [
    ["checkpoint", policy.checkpoint], ["pruner", info.pruner ?? policy.pruner],
    ["engine", engineOf(info.engine ?? policy.engine)], ["action head", policy.action_head],
    ["robot", robot.name && `${robot.name}, ${robot.control_rate_hz} Hz`],
    ["action chunk", robot.chunk_length && `${robot.chunk_length} actions, ${robot.open_loop_steps} executed by default`],
    ["visual tokens", info.num_visual_tokens], ["statistics", info.unnorm_key], ["out of bounds", info.out_of_bounds],
    ["device", policy.device_name && `${policy.device_name}, ${policy.dtype}`],
    ["convention", info.convention], ["version", info.versions?.lightvla],
    ...(policy.assumptions ?? []).map((text) => ["assumed", text]),
  ];
  $("facts").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => [element("dt", name), element("dd", plain(value))]));
}

function engineOf(engine) {
  if (!engine || typeof engine !== "object") return engine;
  const { name, ...rest } = engine;
  return Object.keys(rest).length ? `${name} (${plain(rest)})` : name;
}

const plain = (value) => value === null || typeof value !== "object" ? String(value ?? "")
  : Object.entries(value).map(([name, one]) => `${name} ${plain(one)}`).join(", ");

// ---- what a person does ----

$("freeze").addEventListener("click", () => (state.frozen ? goLive() : freeze()));
$("back").addEventListener("click", () => step(-1));
$("forward").addEventListener("click", () => step(1));
$("download").addEventListener("click", download);
$("place").addEventListener("input", () => freeze(Number($("place").value)));
$("client").addEventListener("change", () => { goLive(); state.moments = []; state.client = null; connect(); });
document.addEventListener("keydown", (event) => {
  const on = event.target, isRange = on.type === "range", isButton = on.tagName === "BUTTON";
  if (event.ctrlKey || event.metaKey || event.altKey || (on.closest("input, select, textarea") && !isRange)) return;
  if ((isRange && event.key.startsWith("Arrow")) || (isButton && event.key === " ")) return; // their own meaning
  const act = { " ": () => (state.frozen ? goLive() : freeze()), ArrowLeft: () => step(-1), ArrowRight: () => step(1), d: download }[event.key];
  if (act) { event.preventDefault(); act(); }
});
for (const id of ["tokens", "latency"]) {
  $(id).addEventListener("pointerdown", (event) => {
    const moments = shownMoments();
    if (!moments.length) return;
    const span = state.facts?.kept_s ?? 60, end = state.frozen ? moments.at(-1).time : Math.max(seconds(), moments.at(-1).time);
    const time = timeAt($(id), event.clientX - $(id).getBoundingClientRect().left, end, span);
    const away = moments.map((one) => Math.abs(one.time - time));
    freeze(away.indexOf(Math.min(...away)));
  });
}
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
setInterval(draw, 1000);
connect();
