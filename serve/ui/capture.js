/* Recording: speech or a sound from the microphone, a photo or a video from the camera. */

import { button, element } from "./dom.js";
import { Medium } from "./media.js";
import { toWav } from "./wav.js";

const DEVICES = {
  speech: { audio: true },
  // What cleans up voices would take away the very sounds that are asked about.
  sound: { audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false } },
  photo: { video: { facingMode: "environment" } },
  video: { video: { facingMode: "environment" }, audio: true },
};

/** Fills `panel` while something is recorded. `done(medium)` gets the clip, `trouble(text)` why there is none. */
export class Capture {
  constructor(panel, { done, trouble, closed }) {
    Object.assign(this, { panel, done, trouble, closed, request: null, stream: null, recorder: null, timer: null });
  }

  get isOpen() {
    return !this.panel.hidden;
  }

  async open(kind) {
    if (this.isOpen) this.close();
    const request = (this.request = Symbol(kind));
    this.kind = kind;
    this.panel.hidden = false;
    this.show(element("p", {}, "Waiting for the browser's permission…"), this.cancelButton());
    try {
      const stream = await devices(kind);
      if (this.request !== request) return stopTracks(stream); // cancelled while the browser asked
      this.stream = stream;
    } catch (error) {
      if (this.request !== request) return;
      this.close();
      return this.trouble(inWords(error, kind));
    }
    if (kind === "photo") this.aim("Take the photo", () => this.photograph());
    else if (kind === "video") this.aim("Start recording", () => this.record());
    else this.record();
  }

  close() {
    clearInterval(this.timer);
    if (this.recorder?.state === "recording") this.recorder.stop();
    if (this.stream) stopTracks(this.stream);
    this.request = this.stream = this.recorder = null;
    this.panel.hidden = true;
    this.panel.replaceChildren();
    this.closed();
  }

  /** The camera's picture, live, with a button that goes on. */
  aim(label, next) {
    this.live = element("video", { playsinline: true, "aria-label": "Camera" });
    this.live.muted = true;
    this.live.srcObject = this.stream;
    this.live.play().catch(() => {}); // refused only when the panel was closed meanwhile
    this.show(this.live, button(label, next, { class: "main" }), this.cancelButton());
  }

  async photograph() {
    const canvas = element("canvas", { width: this.live.videoWidth, height: this.live.videoHeight });
    canvas.getContext("2d").drawImage(this.live, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    this.close();
    if (blob) this.done(new Medium(fileOf(blob, "photo"), "image"));
    else this.trouble("The camera has sent no picture yet. Try again.");
  }

  record() {
    const pieces = [];
    const recorder = new MediaRecorder(this.stream);
    this.recorder = recorder;
    recorder.ondataavailable = ({ data }) => pieces.push(data);
    recorder.start();
    const time = element("span", { class: "time", role: "timer" }, "0:00");
    const started = performance.now();
    this.timer = setInterval(() => (time.textContent = clock(performance.now() - started)), 250);
    const finish = () => {
      recorder.onstop = () => this.attach(new Blob(pieces, { type: recorder.mimeType }));
      recorder.stop();
    };
    this.show(
      this.kind === "video" ? this.live : null,
      element("p", { class: "recording" }, `Recording ${this.kind === "sound" ? "a sound" : this.kind}`, time),
      button("Stop and attach", finish, { class: "main" }),
      this.cancelButton(),
    );
  }

  async attach(blob) {
    const kind = this.kind;
    this.close();
    try {
      if (kind === "video") this.done(new Medium(fileOf(blob, "recording"), "video"));
      else this.done(new Medium(fileOf(await toWav(blob), kind), "audio", kind));
    } catch {
      this.trouble("Nothing was recorded. Try again, a little longer.");
    }
  }

  show(...nodes) {
    this.panel.replaceChildren(...nodes.filter(Boolean));
    this.panel.querySelector("button").focus();
  }

  cancelButton() {
    return button("Cancel", () => this.close(), { class: "quiet" });
  }
}

async function devices(kind) {
  if (!navigator.mediaDevices?.getUserMedia) throw new DOMException("", "NotSupportedError");
  try {
    return await navigator.mediaDevices.getUserMedia(DEVICES[kind]);
  } catch (error) {
    if (kind !== "video" || error.name !== "NotFoundError") throw error;
    return navigator.mediaDevices.getUserMedia(DEVICES.photo); // a camera without a microphone
  }
}

function inWords(error, kind) {
  const device = kind === "photo" || kind === "video" ? "camera" : "microphone";
  const reasons = {
    NotSupportedError: isSecureContext
      ? `This browser offers no ${device} to pages. Attach a file instead.`
      : `Browsers give pages a ${device} only over https or on localhost. Attach a file instead.`,
    NotAllowedError: `The browser refused the ${device}. Allow it for this page in the address bar, then try again.`,
    NotFoundError: `No ${device} was found. Attach a file instead.`,
    NotReadableError: `The ${device} can't be opened. Does another program use it?`,
  };
  return reasons[error.name] ?? `The ${device} can't be used: ${error.message}`;
}

function fileOf(blob, name) {
  const extension = blob.type.split(";")[0].split("/")[1].replace("jpeg", "jpg");
  return new File([blob], `${name}.${extension}`, { type: blob.type });
}

function clock(milliseconds) {
  const seconds = Math.floor(milliseconds / 1000);
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

function stopTracks(stream) {
  for (const track of stream.getTracks()) track.stop();
}
