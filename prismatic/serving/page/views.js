// A camera's picture with pruned patches dimmed, as the reports draw it.

const SIDE = 512, OUTLINE = "rgb(255, 205, 70)";

/** Hexadecimal, eight tokens a byte, first token highest -> array of booleans. */
export function unpackBits(hex, count) {
  const bits = new Array(count);
  for (let i = 0; i < count; i++) bits[i] = ((parseInt(hex[i >> 2], 16) >> (3 - (i & 3))) & 1) === 1;
  return bits;
}

/** The square grid of a camera: {side, kept}, or null where its tokens are none. */
export function gridOf(moment, camera) {
  const place = moment.cameras.indexOf(camera), number = moment.tokens / moment.cameras.length;
  const side = Math.round(Math.sqrt(number));
  if (moment.kept === null || side * side !== number) return null;
  return { side, kept: unpackBits(moment.kept, moment.tokens).slice(place * number, (place + 1) * number) };
}

/** crop: side of the central part that the policy saw, as a share of the picture's. */
export function drawView(canvas, picture, grid, crop) {
  const scale = SIDE / Math.max(picture.width, picture.height);
  const width = Math.round(picture.width * scale), height = Math.round(picture.height * scale);
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const c = canvas.getContext("2d");
  c.globalCompositeOperation = "source-over";
  c.imageSmoothingQuality = "high";
  c.drawImage(picture, 0, 0, width, height);
  if (!grid || grid.kept.every(Boolean)) return;
  const column = (i) => Math.round(width * ((1 - crop) / 2 + (crop * i) / grid.side));
  const row = (i) => Math.round(height * ((1 - crop) / 2 + (crop * i) / grid.side));
  const isKept = (r, k) => r >= 0 && k >= 0 && r < grid.side && k < grid.side && grid.kept[r * grid.side + k];
  const pruned = new Path2D(), outline = new Path2D();
  pruned.rect(0, 0, width, height);
  for (let r = 0; r < grid.side; r++) {
    for (let k = 0; k < grid.side; k++) {
      if (!isKept(r, k)) continue;
      const [left, right, top, bottom] = [column(k), column(k + 1), row(r), row(r + 1)];
      pruned.rect(left, top, right - left, bottom - top);
      const line = (x1, y1, x2, y2) => { outline.moveTo(x1, y1); outline.lineTo(x2, y2); };
      if (!isKept(r - 1, k)) line(left, top + 1, right, top + 1);
      if (!isKept(r + 1, k)) line(left, bottom - 1, right, bottom - 1);
      if (!isKept(r, k - 1)) line(left + 1, top, left + 1, bottom);
      if (!isKept(r, k + 1)) line(right - 1, top, right - 1, bottom);
    }
  }
  c.globalCompositeOperation = "saturation";
  c.fillStyle = "rgba(128, 128, 128, .5)";
  c.fill(pruned, "evenodd");
  c.globalCompositeOperation = "source-over";
  c.fillStyle = "rgba(0, 0, 0, .7)";
  c.fill(pruned, "evenodd");
  c.strokeStyle = OUTLINE;
  c.lineWidth = 2;
  c.stroke(outline);
}

/** Takes the base64 of a JPEG apart; resolves to a bitmap, to be closed. */
export function bitmapOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
}
