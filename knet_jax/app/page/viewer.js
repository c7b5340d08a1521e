// Shows a result. Whatever segment the pointer is on, in the picture or in the list, stands out.
// `element`, `props` and `watch` are those of gr.HTML; props.shell is viewer.html, and props.value what
// `display` of demo.py gives. Elements of our own, out of reach of the page: it would renew them.
const root = element.attachShadow({ mode: "open" });
root.innerHTML = props.shell;
const find = (selector) => root.querySelector(selector);
let ids = new Uint32Array();
let segments = new Map();
let current = 0;
let turns = 0;

async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

async function show() {
  const turn = ++turns;
  const value = props.value || {};
  const [picture, map] = await Promise.all([value.picture, value.ids].map((url) => url && decoded(url)));
  if (turn !== turns) return; // a later one has come meanwhile
  find(".message").textContent = value.message || "";
  find(".message").classList.toggle("error", Boolean(value.error));
  find(".stage").classList.toggle("empty", !map);
  find("figcaption").textContent = (value.facts || []).join(" · ");
  segments = new Map((value.segments || []).map((segment) => [segment.id, segment]));
  find("ul").replaceChildren(...[...segments.values()].map(entry));
  ids = new Uint32Array();
  current = 0;
  if (!map) return;
  picture.alt = "the picture under its segments";
  find("img").replaceWith(picture);
  const canvas = find("canvas");
  canvas.width = map.width;
  canvas.height = map.height;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(map, 0, 0);
  const pixels = pen.getImageData(0, 0, map.width, map.height);
  // Bytes R, G, B, A: the number of a segment is R + 256 G + 65536 B.
  ids = new Uint32Array(pixels.data.buffer).map((pixel) => pixel & 0xffffff);
  light(0);
}

function entry(segment) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const color = document.createElement("i");
  color.style.background = segment.color;
  button.type = "button";
  button.dataset.id = segment.id;
  button.append(color, segment.name, " ", segment.score);
  button.title = segment.share;
  item.append(button);
  return item;
}

// Darkens everything but one segment; of 0 nothing.
function light(id) {
  current = id;
  const canvas = find("canvas");
  const pen = canvas.getContext("2d");
  const shade = pen.createImageData(canvas.width, canvas.height);
  if (id) new Uint32Array(shade.data.buffer).forEach((_, i, all) => (all[i] = ids[i] === id ? 0 : 0x99000000));
  pen.putImageData(shade, 0, 0);
  for (const button of root.querySelectorAll("button"))
    button.classList.toggle("lit", Number(button.dataset.id) === id);
  if (!id) find(".name").textContent = "";
}

function point(event) {
  const canvas = find("canvas");
  if (!ids.length) return;
  const frame = canvas.getBoundingClientRect();
  const x = event.clientX - frame.left;
  const y = event.clientY - frame.top;
  const column = Math.floor((x / frame.width) * canvas.width);
  const row = Math.floor((y / frame.height) * canvas.height);
  const inside = column >= 0 && row >= 0 && column < canvas.width && row < canvas.height;
  const segment = inside ? segments.get(ids[row * canvas.width + column]) : undefined;
  if ((segment?.id || 0) !== current) light(segment?.id || 0);
  const name = find(".name");
  name.textContent = segment ? [segment.name, segment.score, segment.share].filter(Boolean).join(" · ") : "";
  name.style.left = Math.max(0, Math.min(x + 14, frame.width - name.offsetWidth)) + "px";
  name.style.top = Math.max(0, y - name.offsetHeight - 8) + "px";
}

function listed(event) {
  const button = event.target.closest("button");
  if (button && ids.length) light(Number(button.dataset.id));
}

const stage = find(".stage");
stage.addEventListener("pointermove", point);
stage.addEventListener("pointerdown", point);
stage.addEventListener("pointerleave", () => current && light(0));
find("ul").addEventListener("pointerover", listed);
find("ul").addEventListener("focusin", listed);
find("ul").addEventListener("pointerleave", () => current && light(0));
find("ul").addEventListener("focusout", () => current && light(0));
watch("value", show);
show();
