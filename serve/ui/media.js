/* Media files: what kind they are, how they look, and the message parts they are sent as. */

import { button, element } from "./dom.js";

// What the server takes by default; it may be set higher, so a larger file is marked, not refused.
const LARGE = 20e6;
const EXTENSIONS = {
  image: ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif"],
  audio: ["wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac"],
  video: ["mp4", "mov", "mkv", "webm", "avi", "m4v", "ogv"],
};
const PLACE = /messages\.(\d+)\.content\.(\d+)(\.\w+)*/g;
const names = new WeakMap(); // of the files that message parts hold
let count = 0;

/** One attached file. `audio` is "speech" or "sound" for an audio file; `withSound` sends a video's track as well. */
export class Medium {
  constructor(file, type, audio = "speech") {
    this.file = file;
    this.type = type;
    this.audio = audio;
    this.withSound = false;
    this.number = ++count;
    this.url = URL.createObjectURL(file);
  }

  /** null for a file that is no image, audio or video. */
  static of(file) {
    const type = typeOf(file);
    return type && new Medium(file, type);
  }

  get name() {
    return this.file.name;
  }

  get label() {
    if (this.type === "audio") return this.audio;
    return this.withSound ? "video + sound" : this.type;
  }

  async parts() {
    this.data ??= dataUrl(this.file, this.type);
    const url = await this.data;
    const parts = [];
    if (this.type !== "audio") parts.push({ type: `${this.type}_url`, [`${this.type}_url`]: { url } });
    else parts.push({ type: "audio_url", audio_url: { url, kind: this.audio } });
    if (this.withSound) parts.push({ type: "audio_url", audio_url: { url, kind: "sound" } });
    for (const part of parts) names.set(part, this.name);
    return parts;
  }

  release() {
    URL.revokeObjectURL(this.url);
  }
}

/** A text of the server with file names for "messages.0.content.1", their places in the request. */
export function withFileNames(text, messages) {
  return text.replace(PLACE, (place, message, part) => names.get(messages[message]?.content[part]) ?? place);
}

function typeOf(file) {
  const [top] = file.type.split("/");
  if (top in EXTENSIONS) return top;
  const extension = file.name.split(".").pop().toLowerCase();
  return Object.keys(EXTENSIONS).find((type) => EXTENSIONS[type].includes(extension)) ?? null;
}

async function dataUrl(file, type) {
  const reader = new FileReader();
  await new Promise((resolve, reject) => {
    reader.onload = resolve;
    reader.onerror = () => reject(new Error(`${file.name} can't be read any more. Was it moved?`));
    reader.readAsDataURL(file);
  });
  // Without parameters: recordings have some, such as ";codecs=vp8,opus", with a comma that misleads parsers.
  const base64 = reader.result.slice(reader.result.lastIndexOf(",") + 1);
  return `data:${file.type.split(";")[0] || `${type}/${file.name.split(".").pop().toLowerCase()}`};base64,${base64}`;
}

/** A card with a preview, a remove button and, while `editable`, the choices of its kind. */
export function mediaCard(medium, { editable, onremove }) {
  const remove = button("×", () => onremove(card), {
    class: "remove",
    "aria-label": editable ? `Remove ${medium.name}` : `Remove ${medium.name} from the conversation`,
    title: "Remove",
  });
  const large = medium.file.size > LARGE;
  const about = element(
    editable ? "div" : "figcaption",
    { class: "about" },
    element("span", { class: "name", title: medium.name }, medium.name),
    element("span", { class: "size" }, editable ? bytes(medium.file.size) : medium.label),
    editable ? choices(medium) : null,
    editable && large ? element("p", { class: "large" }, `Over ${bytes(LARGE)}: the server may refuse it.`) : null,
    remove,
  );
  const card = element(editable ? "li" : "figure", { class: `medium ${medium.type}` }, preview(medium), about);
  return card;
}

function preview(medium) {
  const node =
    medium.type === "image"
      ? element("img", { src: medium.url, alt: medium.name })
      : element(medium.type, { src: medium.url, controls: true, preload: "metadata", "aria-label": medium.name });
  // Pictures of a few pixels are enlarged as they are, not blurred.
  node.addEventListener("load", () => node.classList.toggle("pixels", node.naturalWidth < 128));
  node.addEventListener("error", () => node.replaceWith(element("p", { class: "unshown" }, "No preview")));
  return node;
}

function choices(medium) {
  if (medium.type === "audio") return audioChoice(medium);
  if (medium.type === "video") {
    const box = element("input", { type: "checkbox", onchange: () => (medium.withSound = box.checked) });
    box.checked = medium.withSound;
    return element("label", { class: "check" }, box, "with its sound");
  }
  return null;
}

function audioChoice(medium) {
  const options = ["speech", "sound"].map((audio) =>
    element(
      "label",
      {},
      element("input", {
        type: "radio",
        name: `audio-${medium.number}`,
        value: audio,
        checked: medium.audio === audio,
        onchange: () => (medium.audio = audio),
      }),
      element("span", {}, audio),
    ),
  );
  const legend = element("legend", { class: "unseen" }, `${medium.name} is`);
  return element("fieldset", { class: "choice" }, legend, ...options);
}

function bytes(count) {
  if (count < 1e6) return `${Math.max(1, Math.round(count / 1e3))} kB`;
  return `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0)} MB`;
}
