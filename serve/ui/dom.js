/* Building elements. Text always becomes text nodes: nothing a model or a user wrote is ever parsed as HTML. */

export const byId = (id) => document.getElementById(id);

/** An element with attributes (true: present, false or null: absent; on...: a listener) and children. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export function button(label, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, label);
}

/** The line under the composer: a hint, or trouble. */
export function notify(text, trouble = false) {
  const notice = byId("notice");
  notice.classList.toggle("bad", trouble);
  // The same words again would be read out again.
  if (notice.textContent !== text) notice.textContent = text;
}
