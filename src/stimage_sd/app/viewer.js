// Slide viewer: maps of a section over its H&E that zoom and pan together.
//
// Positions are pixels of the H&E. The view is the point in the middle of a map and the screen pixels per H&E pixel.
// Only the pieces of the slide that are in view are fetched, at the resolution of the screen.

const MOST_PIECES = 400; // pieces in memory
const MOST_REQUESTS = 6;
const MOST_SCALE = 8;
const STILL = 4; // screen px that a pointer may move in a click
const GRAY = "rgb(150, 150, 150)";

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".viewer");
  if (!root.viewer) root.viewer = new Viewer(root);
  root.viewer.update(data, (tile) => setTriggerValue("tile", tile));
  return () => root.viewer.close();
}

class Viewer {
  constructor(root) {
    this.root = root;
    this.maps = [...root.querySelectorAll(".map")].map((element) => new SlideMap(element, this));
    this.pieces = new Pieces(() => this.draw());
    this.opacity = root.querySelector("input");
    this.opacity.addEventListener("input", () => this.draw());
    const actions = { in: () => this.zoom(1.6), out: () => this.zoom(1 / 1.6), whole: () => this.fit(), tile: () => this.showTile() };
    for (const [name, act] of Object.entries(actions)) {
      root.querySelector(`.${name}`).addEventListener("click", act);
    }
    this.resized = new ResizeObserver(() => this.resize());
    this.resized.observe(root);
  }

  close() {
    this.resized.disconnect();
    this.pieces.forget();
  }

  update(data, choose) {
    const isNew = this.data?.address !== data.address;
    this.data = data;
    this.choose = choose;
    this.places = new Map(data.tiles.id.map((id, row) => [id, row]));
    this.root.querySelector(".tile").disabled = !this.places.has(data.chosen);
    if (isNew) {
      this.pieces.serve(data);
      this.view = null;
    }
    this.maps.forEach((map, number) => map.show(data.maps[number]));
    this.resize();
  }

  // -- view

  resize() {
    if (!this.data) return;
    const [left, top, right, bottom] = this.data.bounds;
    const width = this.maps[0].element.clientWidth;
    if (!width) return;
    const height = Math.round(Math.min(Math.max((width * (bottom - top)) / (right - left), 300), 560));
    this.maps.forEach((map) => map.resize(height));
    if (!this.view) this.fit();
    else this.draw();
  }

  fit() {
    const [left, top, right, bottom] = this.data.bounds;
    const { width, height } = this.maps[0];
    this.whole = Math.min(width / (right - left), height / (bottom - top));
    this.view = { x: (left + right) / 2, y: (top + bottom) / 2, scale: this.whole };
    this.draw();
  }

  showTile() {
    const row = this.places.get(this.data.chosen);
    if (row === undefined) return;
    const { width, height } = this.maps[0];
    const { x, y } = this.data.tiles;
    this.view = { x: x[row], y: y[row], scale: this.limited(Math.min(width, height) / (2.5 * this.data.side)) };
    this.draw();
  }

  limited(scale) {
    const { width, height } = this.maps[0];
    const least = Math.min(this.whole, Math.min(width / this.data.width, height / this.data.height)) * 0.8;
    return Math.min(Math.max(scale, least), MOST_SCALE);
  }

  // The point under the pointer, by default the middle, keeps its place.
  zoom(factor, dx = 0, dy = 0) {
    const { x, y, scale } = this.view;
    const next = this.limited(scale * factor);
    this.look(x + dx / scale - dx / next, y + dy / scale - dy / next, next);
  }

  move(dx, dy) {
    const { x, y, scale } = this.view;
    this.look(x - dx / scale, y - dy / scale, scale);
  }

  look(x, y, scale) {
    const { width, height } = this.data;
    this.view = { x: Math.min(Math.max(x, 0), width), y: Math.min(Math.max(y, 0), height), scale };
    this.draw();
  }

  draw() {
    if (this.waits || !this.view) return;
    this.waits = true;
    requestAnimationFrame(() => {
      this.waits = false;
      this.pieces.want([]);
      this.maps.forEach((map) => map.draw(this.view, Number(this.opacity.value) / 100));
      this.pieces.fetch();
      // for tests and for screen readers that report the state
      this.root.dataset.scale = this.view.scale;
      this.root.dataset.center = `${this.view.x},${this.view.y}`;
      this.root.dataset.complete = this.pieces.complete;
      this.root.querySelector(".failed").hidden = !this.pieces.failed;
    });
  }
}

// Pieces of the slide by level, column and row: fetched when they are in view, and kept while there is room.
class Pieces {
  constructor(changed) {
    this.changed = changed;
    this.forget();
  }

  forget() {
    this.kept = new Map();
    this.wanted = [];
    this.requests = 0;
    this.failed = false;
  }

  serve({ address, width, height, side, last_level, piece_px }) {
    this.forget();
    Object.assign(this, { address, width, height, last: last_level, px: piece_px });
  }

  // The last pieces to ask for are fetched first.
  want(pieces) {
    this.wanted = pieces;
  }

  get complete() {
    return this.wanted.every((key) => this.kept.get(key)?.done);
  }

  fetch() {
    for (const key of this.wanted) {
      if (this.requests >= MOST_REQUESTS) return;
      if (!this.kept.has(key)) this.request(key);
    }
  }

  request(key) {
    const piece = { image: new Image(), done: false };
    const { address } = this;
    this.kept.set(key, piece);
    this.requests += 1;
    const ended = (failed) => {
      if (address !== this.address) return;
      this.requests -= 1;
      piece.done = true;
      piece.bad = failed;
      this.failed = failed;
      for (const old of this.kept.keys()) {
        if (this.kept.size <= MOST_PIECES) break;
        if (!this.wanted.includes(old)) this.kept.delete(old);
      }
      this.changed();
    };
    piece.image.onload = () => ended(false);
    piece.image.onerror = () => ended(true);
    piece.image.src = `${address}${key}.jpg`;
  }

  // Draw a box of the H&E, with coarse pieces under those that are not there yet.
  draw(context, box, scale, toScreen) {
    const finest = Math.min(Math.max(Math.floor(Math.log2(1 / scale) + 0.3), 0), this.last);
    for (let level = this.last; level >= finest; level -= 1) {
      const reduction = 2 ** level;
      const length = this.px * reduction;
      const columns = [Math.max(Math.floor(box.left / length), 0), Math.min(box.right, this.width - 1) / length];
      const rows = [Math.max(Math.floor(box.top / length), 0), Math.min(box.bottom, this.height - 1) / length];
      for (let row = rows[0]; row <= rows[1]; row += 1) {
        for (let column = columns[0]; column <= columns[1]; column += 1) {
          const key = `${level}/${column}_${row}`;
          if ((level === finest || level === this.last) && !this.wanted.includes(key)) this.wanted.push(key);
          const piece = this.kept.get(key);
          if (!piece?.done || piece.bad) continue;
          const [x, y] = toScreen(column * length, row * length);
          const right = Math.min((column + 1) * length, this.width);
          const bottom = Math.min((row + 1) * length, this.height);
          const [x2, y2] = toScreen(right, bottom);
          // whole screen pixels, so that no seam is seen between pieces
          context.drawImage(piece.image, Math.round(x), Math.round(y), Math.round(x2) - Math.round(x), Math.round(y2) - Math.round(y));
        }
      }
    }
  }
}

class SlideMap {
  constructor(element, viewer) {
    this.element = element;
    this.viewer = viewer;
    this.canvas = element.querySelector("canvas");
    this.context = this.canvas.getContext("2d");
    this.tip = element.querySelector(".tip");
    this.pointers = new Map();
    const listen = (name, act, options) => this.canvas.addEventListener(name, act, options);
    listen("wheel", (event) => this.wheel(event), { passive: false });
    listen("pointerdown", (event) => this.down(event));
    listen("pointermove", (event) => this.moved(event));
    listen("pointerup", (event) => this.up(event));
    listen("pointercancel", (event) => this.pointers.delete(event.pointerId));
    listen("pointerleave", () => this.hover(null));
    listen("keydown", (event) => this.key(event));
  }

  show(shown) {
    this.shown = shown;
    this.element.querySelector(".title").textContent = shown.title;
    this.canvas.setAttribute("aria-label", `${shown.title}. Arrow keys move the slide, plus and minus zoom.`);
    this.element.querySelector(".colors").style.background = `linear-gradient(to right, ${shown.colors.join(", ")})`;
    const ticks = shown.ticks.map(([share, label]) => {
      const tick = document.createElement("span");
      tick.textContent = label;
      tick.style.left = `${100 * share}%`;
      return tick;
    });
    this.element.querySelector(".ticks").replaceChildren(...ticks);
    this.element.querySelector(".unit").textContent = shown.unit;
  }

  resize(height) {
    const ratio = window.devicePixelRatio || 1;
    this.width = this.element.clientWidth;
    this.height = height;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.ratio = ratio;
  }

  // -- drawing

  draw(view, opacity) {
    const { context, ratio, width, height } = this;
    const scale = view.scale * ratio;
    const toScreen = (x, y) => [(x - view.x) * scale + this.canvas.width / 2, (y - view.y) * scale + this.canvas.height / 2];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "white";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const box = {
      left: view.x - width / 2 / view.scale, right: view.x + width / 2 / view.scale,
      top: view.y - height / 2 / view.scale, bottom: view.y + height / 2 / view.scale,
    };
    this.viewer.pieces.draw(context, box, scale, toScreen);
    this.drawTiles(box, scale, toScreen, opacity);
    this.drawBar(view.scale);
  }

  drawTiles(box, scale, toScreen, opacity) {
    const { context, shown } = this;
    const { tiles, side, chosen, outside } = this.viewer.data;
    const half = side / 2;
    context.globalAlpha = opacity;
    for (let row = 0; row < tiles.id.length; row += 1) {
      const x = tiles.x[row], y = tiles.y[row], color = shown.values[row];
      if (color < 0 || x + half < box.left || x - half > box.right || y + half < box.top || y - half > box.bottom) continue;
      const [left, top] = toScreen(x - half, y - half);
      context.fillStyle = outside.length && outside[row] && shown.masked ? GRAY : shown.colors[color];
      context.fillRect(left, top, side * scale, side * scale);
    }
    context.globalAlpha = 1;
    const row = this.viewer.places.get(chosen);
    if (row === undefined) return;
    const [left, top] = toScreen(tiles.x[row] - half, tiles.y[row] - half);
    for (const [color, line] of [["black", 4], ["white", 2]]) {
      context.strokeStyle = color;
      context.lineWidth = line * this.ratio;
      context.strokeRect(left, top, side * scale, side * scale);
    }
  }

  drawBar(scale) {
    const { mpp } = this.viewer.data;
    const bar = this.element.querySelector(".bar");
    bar.hidden = mpp === null;
    if (mpp === null) return;
    const most = (Math.min(this.width / 3, 150) / scale) * mpp;
    const power = 10 ** Math.floor(Math.log10(most));
    const length = power * [5, 2, 1].find((factor) => factor * power <= most);
    bar.querySelector(".line").style.width = `${(length / mpp) * scale}px`;
    bar.querySelector(".length").textContent = length >= 1000 ? `${length / 1000} mm` : `${Number(length.toPrecision(1))} µm`;
  }

  // -- pointer and keys

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left - this.width / 2, event.clientY - box.top - this.height / 2];
  }

  tileAt(event) {
    const [dx, dy] = this.at(event);
    const { view, data } = this.viewer;
    const x = view.x + dx / view.scale, y = view.y + dy / view.scale, half = data.side / 2;
    // the tile whose center is nearest, because tiles on spots can overlap
    let nearest = -1, least = Infinity;
    for (let row = 0; row < data.tiles.id.length; row += 1) {
      const away = Math.max(Math.abs(data.tiles.x[row] - x), Math.abs(data.tiles.y[row] - y));
      if (away <= half && away < least) [nearest, least] = [row, away];
    }
    return nearest;
  }

  wheel(event) {
    event.preventDefault();
    this.viewer.zoom(Math.exp(-Math.max(-200, Math.min(200, event.deltaY)) / 400), ...this.at(event));
  }

  down(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.at(event));
    this.still = this.pointers.size === 1;
    this.start = this.at(event);
  }

  moved(event) {
    if (!this.pointers.has(event.pointerId)) {
      this.hover(event);
      return;
    }
    const before = [...this.pointers.values()];
    this.pointers.set(event.pointerId, this.at(event));
    const now = [...this.pointers.values()];
    if (Math.hypot(now[0][0] - this.start[0], now[0][1] - this.start[1]) > STILL) this.still = false;
    if (now.length === 1 && !this.still) {
      this.hover(null);
      this.viewer.move(now[0][0] - before[0][0], now[0][1] - before[0][1]);
    }
    if (now.length === 2) {
      const apart = (points) => Math.hypot(points[0][0] - points[1][0], points[0][1] - points[1][1]);
      const middle = (points, axis) => (points[0][axis] + points[1][axis]) / 2;
      this.viewer.move(middle(now, 0) - middle(before, 0), middle(now, 1) - middle(before, 1));
      this.viewer.zoom(apart(now) / Math.max(apart(before), 1), middle(now, 0), middle(now, 1));
    }
  }

  up(event) {
    if (!this.pointers.delete(event.pointerId) || !this.still) return;
    this.still = false;
    const row = this.tileAt(event);
    if (row >= 0) this.viewer.choose(this.viewer.data.tiles.id[row]);
  }

  hover(event) {
    const row = event === null ? -1 : this.tileAt(event);
    this.tip.hidden = row < 0;
    if (row < 0) return;
    this.tip.textContent = this.viewer.data.tiles.words[row];
    const [dx, dy] = this.at(event);
    this.tip.style.left = `${Math.min(dx + this.width / 2 + 12, this.width - this.tip.offsetWidth)}px`;
    this.tip.style.top = `${Math.min(dy + this.height / 2 + 14, this.height - this.tip.offsetHeight)}px`;
  }

  key(event) {
    const step = 60;
    const acts = {
      "+": () => this.viewer.zoom(1.6), "=": () => this.viewer.zoom(1.6), "-": () => this.viewer.zoom(1 / 1.6),
      0: () => this.viewer.fit(), ArrowLeft: () => this.viewer.move(step, 0), ArrowRight: () => this.viewer.move(-step, 0),
      ArrowUp: () => this.viewer.move(0, step), ArrowDown: () => this.viewer.move(0, -step),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    acts[event.key]();
  }
}
