/* One turn of the conversation: a question with its media, the answer as it comes, and what became of it. */

import { button, element } from "./dom.js";
import { expertView } from "./experts.js";
import { mediaCard, withFileNames } from "./media.js";

export class Turn {
  /** `actions`: retry(turn), edit(turn). */
  constructor(text, media, actions) {
    Object.assign(this, { text, media, actions, state: "waiting", answer: "" });
    this.answerNode = element("p", { class: "text", "aria-live": "polite" });
    this.footNode = element("div", { class: "foot" });
    const cards = media.map((medium) =>
      mediaCard(medium, { editable: false, onremove: (card) => this.remove(medium, card) }),
    );
    this.node = element(
      "article",
      { class: "turn" },
      element(
        "div",
        { class: "asked" },
        element("h2", { class: "unseen" }, "You"),
        cards.length ? element("div", { class: "media" }, ...cards) : null,
        text ? element("p", { class: "text" }, text) : null,
      ),
      element(
        "div",
        { class: "answered" },
        element("h2", { class: "unseen" }, "Answer"),
        this.answerNode,
        this.footNode,
      ),
    );
  }

  /** Whether later turns build on this one: failed questions, and those with everything removed, are left out. */
  get counts() {
    const kept = this.state === "done" || (this.state === "stopped" && this.answer !== "");
    return kept && Boolean(this.text || this.media.length);
  }

  async question() {
    const parts = (await Promise.all(this.media.map((medium) => medium.parts()))).flat();
    if (this.text) parts.push({ type: "text", text: this.text });
    return { role: "user", content: parts };
  }

  reply() {
    return { role: "assistant", content: this.answer };
  }

  start() {
    this.answer = "";
    this.firstToken = this.finishedAt = this.usage = this.expertLoad = this.finishReason = null;
    this.footNode.replaceChildren();
    this.answerNode.replaceChildren();
    // Screen readers wait for the end instead of reading every piece.
    this.answerNode.setAttribute("aria-busy", "true");
    this.become("waiting");
  }

  /** Starts the clock of the statistics. */
  sent() {
    this.sentAt = performance.now();
  }

  take(chunk) {
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content;
    if (piece) {
      this.firstToken ??= performance.now();
      this.answer += piece;
      this.answerNode.append(piece);
      this.become("streaming");
    }
    if (choice?.finish_reason) {
      this.finishReason = choice.finish_reason;
      this.finishedAt = performance.now();
    }
    this.usage = chunk.usage ?? this.usage;
    this.expertLoad = chunk.expert_load ?? this.expertLoad;
  }

  finish() {
    this.become("done");
    if (!this.answer) this.answerNode.append(element("span", { class: "muted" }, "The answer is empty."));
    this.footNode.append(this.statistics());
    const experts = this.expertLoad && expertView(this.expertLoad);
    if (experts) this.footNode.append(experts);
  }

  stop() {
    this.become("stopped");
    const kept = this.answer ? "Stopped." : "Stopped before the first word; not part of the conversation.";
    this.footNode.append(element("p", { class: "stats" }, kept), this.wayOut("Ask again"));
  }

  fail(error, messages) {
    this.become("failed");
    const wait = error.retryAfter ? ` The server asks to wait ${error.retryAfter} s.` : "";
    const words = withFileNames(error.message, messages) + wait;
    this.footNode.append(element("p", { class: "error", role: "alert" }, words), this.wayOut("Retry"));
  }

  remove(medium, card) {
    this.media = this.media.filter((other) => other !== medium);
    medium.release();
    card.remove();
  }

  release() {
    for (const medium of this.media) medium.release();
    this.node.remove();
  }

  become(state) {
    this.state = state;
    this.node.dataset.state = state;
    if (state !== "waiting" && state !== "streaming") this.answerNode.setAttribute("aria-busy", "false");
  }

  wayOut(label) {
    return element(
      "p",
      { class: "ways" },
      button(label, () => this.actions.retry(this)),
      button("Edit", () => this.actions.edit(this), { class: "quiet", title: "Back into the question box" }),
    );
  }

  statistics() {
    const { firstToken, sentAt, finishedAt, usage, finishReason } = this;
    const seconds = (time) => (time - sentAt) / 1000;
    const facts = [];
    if (firstToken) facts.push(`first token after ${seconds(firstToken).toFixed(2)} s`);
    // Over the whole time: tokens may arrive bunched, so the time between them says nothing for short answers.
    if (usage && finishedAt) facts.push(`${(usage.completion_tokens / seconds(finishedAt)).toFixed(1)} tokens/s`);
    if (usage) facts.push(`${usage.prompt_tokens} tokens read, ${usage.completion_tokens} written`);
    if (finishReason === "length") facts.push("cut off at the token limit");
    return element("ul", { class: "stats" }, ...facts.map((fact) => element("li", {}, fact)));
  }
}
