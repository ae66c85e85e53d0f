// The controls of `lightvla play`: what the robot is asked, where things stand, which pruner the policy runs with.

const OWN = "a sentence of your own …";
const VIEW = { near: 0.3, far: -0.56, side: 0.43 }; // metres: x towards the viewer, y to the left, as the camera sees it
const POLL_MS = 300;
const REACH_PX = 16;
const FARTHEST_CM = 30;

const panel = document.getElementById("panel");
const style = document.createElement("link");
style.rel = "stylesheet";
style.href = "/play/panel.css";
document.head.append(style);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function numberOfCm() { return element("input", { type: "number", step: 1, min: -FARTHEST_CM, max: FARTHEST_CM }); }
const labelled = (text, control) => element("label", {}, element("span", { textContent: text }), control);

const instruction = element("select"), own = element("input", { type: "text", maxLength: 300, hidden: true, placeholder: "put the …" });
const initialState = element("input", { type: "number", min: 0, value: 30 });
const pruner = element("select");
const start = element("button", { type: "button", className: "main", textContent: "Start" });
const pause = element("button", { type: "button", textContent: "Pause", disabled: true });
const reset = element("button", { type: "button", textContent: "Reset" });
const said = element("p", { className: "said" }), detail = element("p", { className: "soft" });
said.setAttribute("role", "status");
const map = element("canvas", { title: "From above: drag an object to another start" });
map.setAttribute("role", "img");
map.setAttribute("aria-label", "The table from above");
const moved = element("select"), dx = numberOfCm(), dy = numberOfCm();
const back = element("button", { type: "button", textContent: "Put all back" });

panel.className = "card play";
panel.append(
  element("div", { className: "fields" },
    labelled("Instruction", instruction), labelled("", own), labelled("Initial state", initialState), labelled("Pruner", pruner),
    element("div", { className: "buttons" }, start, pause, reset), said, detail),
  element("div", { className: "fields" },
    labelled("Move", moved), labelled("away, cm", dx), labelled("to the left, cm", dy), back,
    element("p", { className: "soft", textContent: "or drag it on the table; the ring is the gripper" })),
  map,
);
own.parentElement.hidden = true;
panel.hidden = false;
document.getElementById("watches").hidden = true; // with these controls the page does more

let state = null, dragged = null, changed = false;
let refusal = ""; // of what was asked last: what stands there until something else is asked
const offsets = new Map(); // object -> [x, y] in metres, as the next episode begins

const limited = (metres) => Math.round(Math.min(Math.max(metres, -FARTHEST_CM / 100), FARTHEST_CM / 100) * 1000) / 1000;
const nameOf = (object) => object.replace(/_\d+$/, "").replaceAll("_", " ");

// ---- what is asked ----

async function post(address, content) {
  try {
    const answer = await fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) });
    refusal = answer.ok ? "" : String((await answer.json()).error);
    if (refusal) showWhatHolds();
  } catch {
    refusal = "the server does not answer";
  } finally {
    poll();
  }
}

/** The fields say what holds, not what was refused. */
function showWhatHolds() {
  if (!state) return;
  offsets.clear();
  for (const [object, offset] of Object.entries(state.offsets)) offsets.set(object, offset);
  initialState.value = String(state.initial_state);
  showOffset();
}

function begin(runs) {
  const sentence = instruction.value === OWN ? own.value.trim() : instruction.value;
  if (!sentence) { refusal = "Type an instruction first."; show(); return; }
  const still = Object.fromEntries([...offsets].filter(([, [x, y]]) => x || y));
  post("/play/begin", { instruction: sentence, initial_state: Number(initialState.value), offsets: still, runs });
}

start.addEventListener("click", () => begin(true));
reset.addEventListener("click", () => begin(false));
pause.addEventListener("click", () => post("/play/run", { runs: state?.phase !== "running" }));
pruner.addEventListener("change", () => post("/play/pruner", { pruner: pruner.value }));
instruction.addEventListener("change", () => {
  const isOwn = instruction.value === OWN;
  own.hidden = own.parentElement.hidden = !isOwn;
  if (isOwn) own.focus();
});
own.addEventListener("keydown", (event) => { if (event.key === "Enter") begin(true); });
initialState.addEventListener("change", () => { offsets.clear(); begin(false); });
moved.addEventListener("change", showOffset);
for (const input of [dx, dy]) {
  input.addEventListener("change", () => {
    offsets.set(moved.value, [limited(-Number(dx.value) / 100), limited(Number(dy.value) / 100)]);
    showOffset();
    begin(false);
  });
}
back.addEventListener("click", () => { offsets.clear(); showOffset(); begin(false); });

function showOffset() {
  const [x, y] = offsets.get(moved.value) ?? [0, 0];
  dx.value = String(Math.round(-x * 100));
  dy.value = String(Math.round(y * 100));
}

// ---- the table from above, as the camera sees it: away from the viewer is up, y to the left ----

function scale() {
  const width = map.clientWidth, height = map.clientHeight;
  return {
    across: (y) => (1 - (y + VIEW.side) / (2 * VIEW.side)) * width,
    down: (x) => ((x - VIEW.far) / (VIEW.near - VIEW.far)) * height,
    x: (down) => VIEW.far + (down / height) * (VIEW.near - VIEW.far),
    y: (across) => (1 - across / width) * 2 * VIEW.side - VIEW.side,
  };
}

/** Where an object stands as the next episode begins. */
function startOf(object) {
  const [x, y] = state.starts[object], [ox, oy] = state.offsets[object] ?? [0, 0], [nx, ny] = offsets.get(object) ?? [0, 0];
  return [x - ox + nx, y - oy + ny];
}

function drawMap() {
  const ratio = window.devicePixelRatio || 1, width = map.clientWidth, height = map.clientHeight;
  if (!width) return;
  map.width = Math.round(width * ratio);
  map.height = Math.round(height * ratio);
  const c = map.getContext("2d"), of = getComputedStyle(map), paint = (name) => of.getPropertyValue(name).trim(), to = scale();
  c.scale(ratio, ratio);
  c.font = "11.5px system-ui, sans-serif";
  c.textAlign = "center";
  const names = [], written = [];
  const mark = ([x, y], colour, radius, text, hollow) => {
    c.beginPath();
    c.arc(to.across(y), to.down(x), radius, 0, 7);
    c.fillStyle = c.strokeStyle = paint(colour);
    c.lineWidth = 2;
    if (hollow) c.stroke(); else c.fill();
    if (text) names.push([to.across(y), to.down(x), radius, text]);
  };
  for (const [object, place] of Object.entries(state.fixtures)) mark(place, "--line", 9, nameOf(object), false);
  if (state.hand) mark(state.hand, "--c2", 6, "", true);
  Object.keys(state.starts).forEach((object) => {
    const place = object === dragged || state.steps === 0 ? startOf(object) : state.places[object];
    mark(place, object === moved.value ? "--accent" : "--c3", 8, nameOf(object), false);
  });
  c.fillStyle = paint("--ink");
  for (const [across, down, radius, text] of names) { // below its mark, or above it where another name stands already
    const half = c.measureText(text).width / 2 + 3, middle = Math.min(Math.max(across, half), width - half);
    const isFree = (at) => written.every(([other, there, its]) => Math.abs(other - middle) > half + its || Math.abs(there - at) > 12);
    const below = down + radius + 12, above = down - radius - 4, at = isFree(below) || !isFree(above) ? below : above;
    written.push([middle, at, half]);
    c.fillText(text, middle, at);
  }
}

const positionOf = (event) => { const box = map.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };

map.addEventListener("pointerdown", (event) => {
  if (!state?.starts) return;
  const [across, down] = positionOf(event), to = scale();
  const away = Object.keys(state.starts).map((object) => {
    const [x, y] = state.steps === 0 ? startOf(object) : state.places[object];
    return [Math.hypot(to.across(y) - across, to.down(x) - down), object];
  }).sort(([one], [other]) => one - other);
  if (!away.length || away[0][0] > REACH_PX) return;
  dragged = moved.value = away[0][1];
  changed = false;
  map.setPointerCapture(event.pointerId);
});
map.addEventListener("pointermove", (event) => {
  if (!dragged) return;
  const [across, down] = positionOf(event), to = scale();
  const [x, y] = state.starts[dragged], [ox, oy] = state.offsets[dragged] ?? [0, 0];
  offsets.set(dragged, [limited(to.x(down) - x + ox), limited(to.y(across) - y + oy)]);
  changed = true;
  showOffset();
  drawMap();
});
map.addEventListener("pointerup", () => {
  const was = dragged;
  dragged = null;
  if (was && changed) begin(false);
  showOffset();
});

// ---- how it stands ----

function tell(text, kind = "") {
  said.textContent = text;
  said.className = `said ${kind}`;
}

function options(select, names, texts = names) {
  if ([...select.options].map((one) => one.value).join("\n") === names.join("\n")) return;
  const before = select.value;
  select.replaceChildren(...names.map((name, i) => element("option", { value: name, textContent: texts[i] })));
  if (names.includes(before)) select.value = before;
}

const PHASES = { starting: "The simulator starts …", ready: "Ready.", running: "The robot acts.", paused: "Paused." };

function show() {
  const sorted = [...state.tasks.filter((task) => task.is_trained), ...state.tasks.filter((task) => !task.is_trained)];
  const sentences = sorted.map((task) => task.instruction), someTrained = sorted[0]?.is_trained;
  const texts = sorted.map((task) => task.instruction + (someTrained && !task.is_trained ? " (not trained)" : ""));
  const isNew = instruction.options.length === 0 && sentences.length > 0;
  if (sentences.length) options(instruction, [...sentences, OWN], [...texts, OWN]);
  if (isNew && sentences.includes(state.instruction)) instruction.value = state.instruction;
  options(pruner, state.pruners);
  if (document.activeElement !== pruner) pruner.value = state.pruner;
  initialState.max = String(Math.max(0, state.num_initial_states - 1));
  options(moved, Object.keys(state.starts), Object.keys(state.starts).map(nameOf));
  if (isNew) showWhatHolds();
  const isWaiting = state.phase === "starting", isNext = state.phase === "paused" && !state.steps;
  for (const control of [start, reset, moved, dx, dy, back]) control.disabled = isWaiting;
  pause.disabled = isNext || !["running", "paused", "held"].includes(state.phase);
  pause.textContent = state.steps && state.phase !== "running" ? "Go on" : "Pause";
  start.textContent = state.steps ? "Start again" : "Start";
  const isBad = ["failed", "held"].includes(state.phase) || (state.phase === "ended" && state.success === false);
  if (refusal) tell(refusal, "bad");
  else tell(state.said || PHASES[isNext ? "ready" : state.phase] || "", isBad ? "bad" : state.success ? "good" : "");
  const goals = state.goals.filter((goal) => goal !== state.instruction);
  detail.textContent = [
    `step ${state.steps} of ${state.max_steps}`,
    state.speed === null ? null : `${state.speed.toFixed(2)} x real time`,
    goals.length ? `also done: ${goals.join(", ")}` : null,
  ].filter(Boolean).join(" · ");
  if (!dragged) drawMap();
}

let polling = null;

async function poll() {
  clearTimeout(polling);
  try {
    const answer = await fetch("/play/state");
    if (answer.ok) { state = await answer.json(); show(); }
  } catch {
    tell("no connection to the server", "bad");
  }
  clearTimeout(polling);
  polling = setTimeout(poll, POLL_MS);
}

poll();
