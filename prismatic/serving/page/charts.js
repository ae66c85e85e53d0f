// Lines and stacked areas over the last minute, drawn on a canvas.

export const colours = (element) => {
  const style = getComputedStyle(element);
  return (name) => style.getPropertyValue(name).trim();
};

/** Sizes a canvas to its place on the page; returns its context in CSS pixels, cleared, with width and height. */
export function surface(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** A round number at or above a value, and a step that cuts it into two to five parts. */
function scaleOf(most) {
  const rough = Math.max(most, 1e-9) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  return { step, top: step * Math.ceil(Math.max(most, 1e-9) / step) };
}

const LEFT = 40, RIGHT = 8, TOP = 8, BOTTOM = 20;

/** The time under a place on a chart, in CSS pixels from its left. */
export const timeAt = (canvas, x, end, span) =>
  end - span * (1 - (x - LEFT) / Math.max(1, canvas.clientWidth - LEFT - RIGHT));

/**
 * series: [{colour, values}], a value per time or null; stacked piles them up.
 * times: seconds; the chart ends at `end` and shows `span` seconds; `marked`: a time with a line, or null.
 * gap: seconds behind which a line is broken.
 */
export function drawOverTime(canvas, { series, times, end, span, stacked, marked, least, gap, endText }) {
  const { context: c, width, height } = surface(canvas);
  const paint = colours(canvas);
  const x = (time) => LEFT + (1 - (end - time) / span) * (width - LEFT - RIGHT);
  const sums = times.map((_, i) => series.reduce((sum, one) => sum + (one.values[i] ?? 0), 0));
  const highest = stacked ? Math.max(0, ...sums) : Math.max(0, ...series.flatMap((one) => one.values.map((v) => v ?? 0)));
  const { step, top } = scaleOf(Math.max(highest, least ?? 0));
  const y = (value) => height - BOTTOM - (value / top) * (height - TOP - BOTTOM);
  c.font = "11.5px system-ui, sans-serif";
  c.lineWidth = 1;
  c.textAlign = "right"; c.textBaseline = "middle";
  for (let value = 0; value <= top * 1.0001; value += step) {
    c.strokeStyle = paint("--line");
    c.beginPath(); c.moveTo(LEFT, y(value)); c.lineTo(width - RIGHT, y(value)); c.stroke();
    c.fillStyle = paint("--soft");
    c.fillText(String(Number(value.toPrecision(4))), LEFT - 6, y(value));
  }
  c.textBaseline = "alphabetic";
  for (let ago = 0; ago <= span; ago += 15) {
    c.textAlign = ago === 0 ? "right" : ago === span ? "left" : "center";
    c.fillText(ago === 0 ? endText : `−${ago} s`, x(end - ago), height - 5);
  }
  c.save();
  c.beginPath(); c.rect(LEFT, 0, width - LEFT - RIGHT + 1, height); c.clip();
  const below = times.map(() => 0);
  for (const { colour, values } of series) {
    c.strokeStyle = c.fillStyle = paint(colour);
    for (const [from, to] of runs(times, values, gap)) {
      if (stacked) fillBetween(c, times, values, below, from, to, x, y);
      else drawLine(c, times, values, from, to, x, y);
    }
    values.forEach((value, i) => { below[i] += value ?? 0; });
  }
  if (marked !== null) {
    c.strokeStyle = paint("--ink"); c.lineWidth = 1.5; c.setLineDash([4, 3]);
    c.beginPath(); c.moveTo(x(marked), TOP - 6); c.lineTo(x(marked), height - BOTTOM); c.stroke();
  }
  c.restore();
}

/** Stretches [from, to) of values that are there, without a longer gap in time. */
function* runs(times, values, gap) {
  let from = null;
  for (let i = 0; i <= times.length; i++) {
    const broken = i === times.length || values[i] === null || (i > 0 && times[i] - times[i - 1] > gap);
    if (broken && from !== null) { yield [from, i]; from = null; }
    if (i < times.length && values[i] !== null && from === null) from = i;
  }
}

function drawLine(c, times, values, from, to, x, y) {
  c.lineWidth = 1.8;
  c.beginPath();
  for (let i = from; i < to; i++) c.lineTo(x(times[i]), y(values[i]));
  if (to - from === 1) c.arc(x(times[from]), y(values[from]), 1.5, 0, 7);
  c.stroke();
}

function fillBetween(c, times, values, below, from, to, x, y) {
  const half = to - from === 1 ? 1 : 0; // a single moment is a thin column
  c.beginPath();
  for (let i = from; i < to; i++) c.lineTo(x(times[i]) - half, y(below[i] + values[i]));
  if (half) c.lineTo(x(times[from]) + half, y(below[from] + values[from]));
  for (let i = to - 1; i >= from; i--) c.lineTo(x(times[i]) + half, y(below[i]));
  if (half) c.lineTo(x(times[from]) - half, y(below[from]));
  c.fill();
}

/** One action dimension: values over the chunk's steps, the training data's bounds as a band, what lies outside marked. */
export function drawDimension(canvas, values, bounds, slack) {
  const { context: c, width, height } = surface(canvas);
  const paint = colours(canvas);
  const all = bounds ? [...values, ...bounds] : [...values, 0];
  const low = Math.min(...all), high = Math.max(...all), room = 0.12 * (high - low || 1);
  const y = (value) => 2 + (1 - (value - low + room) / (high - low + 2 * room)) * (height - 4);
  const x = (i) => 5 + (i / Math.max(1, values.length - 1)) * (width - 10);
  if (bounds) {
    c.fillStyle = paint("--band");
    c.fillRect(0, y(bounds[1]), width, Math.max(1, y(bounds[0]) - y(bounds[1])));
  }
  if (low - room < 0 && high + room > 0) {
    c.strokeStyle = paint("--line"); c.lineWidth = 1;
    c.beginPath(); c.moveTo(0, y(0)); c.lineTo(width, y(0)); c.stroke();
  }
  c.strokeStyle = paint("--c1"); c.lineWidth = 1.5;
  c.beginPath();
  values.forEach((value, i) => c.lineTo(x(i), y(value)));
  c.stroke();
  values.forEach((value, i) => {
    const out = isOutside(value, bounds, slack);
    c.fillStyle = paint(out ? "--bad" : "--c1");
    c.beginPath(); c.arc(x(i), y(value), out ? 4 : 2.5, 0, 7); c.fill();
  });
}

/** slack: how far outside is no news. */
export const isOutside = (value, bounds, slack) => Boolean(bounds) && (value < bounds[0] - slack - 1e-6 || value > bounds[1] + slack + 1e-6);
