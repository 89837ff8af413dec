/* Which model answers, whether it can be reached, and the key that it may want. */

import { byId, notify } from "./dom.js";
import { firstModel } from "./stream.js";

const RECONNECT_MS = 4000;
const apiKey = byId("api-key");
let timer = null;

export const connection = {
  model: null,

  get key() {
    return apiKey.value;
  },

  /** Looks for a model, again and again until there is one. */
  async connect() {
    clearTimeout(timer);
    const before = byId("status").dataset.state;
    try {
      this.model = await firstModel(this.key);
      show("ready", `${this.model} · ready`);
      document.title = `${this.model} · Uni-MoE`;
      if (before === "unreachable") notify("");
    } catch (error) {
      this.model = null;
      if (error.status === 401) return this.askForKey();
      show("unreachable", "unreachable");
      notify(error.message, true);
      timer = setTimeout(() => this.connect(), RECONNECT_MS);
    }
  },

  askForKey() {
    show("unreachable", "needs an API key");
    notify(this.key ? "The server doesn't accept this API key." : "The server wants an API key.", true);
    byId("settings").open = true;
    apiKey.focus();
  },

  rememberKey() {
    apiKey.value = sessionStorage.getItem("api-key") ?? "";
    apiKey.addEventListener("change", () => {
      sessionStorage.setItem("api-key", apiKey.value);
      this.connect();
    });
  },
};

function show(state, text) {
  byId("status").dataset.state = state;
  byId("status").textContent = text;
}
