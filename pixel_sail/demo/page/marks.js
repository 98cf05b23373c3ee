// Drawing on the image: marks of the user and masks of the model, in image coordinates.

const MARK_COLOUR = "#ffffff";
const SMALLEST_BOX = 3;
const SHARP_SIDE = 1000;

// Everything drawn on one canvas: the image, masks over it, marks on top.
export class ImageView {
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onChange = onChange;
    this.tool = "box";
    this.image = null;
    this.marks = [];
    this.masks = [];
    this.draft = null;
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", () => { this.draft = null; this.render(); });
    new ResizeObserver(() => this.render()).observe(canvas);
  }

  show(image) {
    this.image = image;
    this.width = image.naturalWidth;
    this.height = image.naturalHeight;
    // Small images get more than one pixel of the canvas each, so that marks on them are sharp.
    this.zoom = Math.max(1, Math.ceil(SHARP_SIDE / Math.max(this.width, this.height)));
    this.canvas.width = this.width * this.zoom;
    this.canvas.height = this.height * this.zoom;
    this.canvas.style.setProperty("--aspect", this.width / this.height);
    this.marks = [];
    this.masks = [];
    this.render();
    this.onChange();
  }

  removeLast() {
    this.marks.pop();
    this.render();
    this.onChange();
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) * this.width / box.width;
    const y = (event.clientY - box.top) * this.height / box.height;
    return [Math.min(Math.max(x, 0), this.width - 0.01), Math.min(Math.max(y, 0), this.height - 0.01)];
  }

  brushWidth() { return Math.max(this.width, this.height) / 30; }

  press(event) {
    if (!this.image || event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    const start = this.place(event);
    if (this.tool === "point") this.finish({ point: start });
    else if (this.tool === "box") this.draft = { start, end: start };
    else this.draft = { path: [start] };
    this.render();
  }

  move(event) {
    if (!this.draft) return;
    if (this.draft.path) this.draft.path.push(this.place(event));
    else this.draft.end = this.place(event);
    this.render();
  }

  release(event) {
    if (!this.draft) return;
    this.move(event);
    const draft = this.draft;
    this.draft = null;
    if (draft.path) this.finish({ brush: this.paintedBy(draft.path), at: draft.path[0] });
    else {
      const [x0, x1] = [draft.start[0], draft.end[0]].sort((a, b) => a - b);
      const [y0, y1] = [draft.start[1], draft.end[1]].sort((a, b) => a - b);
      // Ignore clicks without a drag.
      if (x1 - x0 >= SMALLEST_BOX && y1 - y0 >= SMALLEST_BOX) this.finish({ box: [x0, y0, x1, y1] });
    }
    this.render();
  }

  finish(mark) {
    this.marks.push(mark);
    this.render();
    this.onChange();
  }

  // Return a canvas of the image's size, black, with the path in white.
  paintedBy(path) {
    const layer = document.createElement("canvas");
    layer.width = this.width;
    layer.height = this.height;
    const context = layer.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, layer.width, layer.height);
    strokePath(context, path, "#fff", this.brushWidth());
    return layer;
  }

  // Return the marks as the server reads them.
  regions() {
    return this.marks.map((mark) => {
      if (mark.box) return { box: mark.box };
      if (mark.point) return { point: mark.point };
      return { png: mark.brush.toDataURL("image/png").split(",")[1] };
    });
  }

  render() {
    if (!this.image) return;
    const { context } = this;
    context.setTransform(this.zoom, 0, 0, this.zoom, 0, 0);
    context.imageSmoothingEnabled = true;
    context.drawImage(this.image, 0, 0, this.width, this.height);
    context.imageSmoothingEnabled = false;
    for (const mask of this.masks) if (mask.visible) context.drawImage(mask.layer, 0, 0);
    // Image pixels per screen pixel, so that marks are readable on narrow and wide screens.
    const scale = this.width / (this.canvas.clientWidth || this.width);
    this.marks.forEach((mark, index) => this.renderMark(mark, String(index), scale));
    if (this.draft?.path) strokePath(context, this.draft.path, "rgba(255, 255, 255, 0.6)", this.brushWidth());
    else if (this.draft) {
      const { start, end } = this.draft;
      outline(context, [start[0], start[1], end[0], end[1]], scale);
    }
  }

  renderMark(mark, name, scale) {
    const { context } = this;
    let [x, y] = mark.point ?? mark.at ?? [mark.box[0], mark.box[1]];
    if (mark.box) outline(context, mark.box, scale);
    if (mark.brush) {
      context.globalAlpha = 0.35;
      context.globalCompositeOperation = "lighten";
      context.drawImage(mark.brush, 0, 0);
      context.globalCompositeOperation = "source-over";
      context.globalAlpha = 1;
    }
    const radius = 11 * scale;
    x = Math.min(Math.max(x, radius), this.width - radius);
    y = Math.min(Math.max(y, radius), this.height - radius);
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fillStyle = "#000";
    context.fill();
    context.lineWidth = 2 * scale;
    context.strokeStyle = MARK_COLOUR;
    context.stroke();
    context.fillStyle = MARK_COLOUR;
    context.font = `bold ${14 * scale}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(name, x, y);
  }
}

function strokePath(context, path, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...path[0]);
  for (const place of path) context.lineTo(...place);
  context.stroke();
}

// Two lines, one dark and one light, are visible on every background.
function outline(context, [x0, y0, x1, y1], scale) {
  for (const [colour, width] of [["#000", 4], [MARK_COLOUR, 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * scale;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  }
}

// Return a black and white PNG (base64) as a layer in one color: half transparent, with an opaque edge.
export async function maskLayer(png, colour) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  const layer = document.createElement("canvas");
  layer.width = image.naturalWidth;
  layer.height = image.naturalHeight;
  const context = layer.getContext("2d");
  context.drawImage(image, 0, 0);
  const { width, height } = layer;
  const pixels = context.getImageData(0, 0, width, height);
  const on = new Uint8Array(width * height);
  for (let i = 0; i < on.length; i++) on[i] = pixels.data[4 * i] > 127 ? 1 : 0;
  const rgb = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = y * width + x;
      const inner = x > 0 && y > 0 && x < width - 1 && y < height - 1
        && on[i - 1] && on[i + 1] && on[i - width] && on[i + width];
      pixels.data.set(rgb, 4 * i);
      pixels.data[4 * i + 3] = on[i] ? (inner ? 128 : 255) : 0;
    }
  }
  context.putImageData(pixels, 0, 0);
  return layer;
}
