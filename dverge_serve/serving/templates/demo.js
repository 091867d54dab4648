"use strict";
// Everything a server or a file says becomes text, never markup: the page's policy forbids the rest.
const PATIENCE_MS = 120000;
const MOST_LABELS = 30;
const find = (id) => document.getElementById(id);
let token = "";
let card = null;
let latest = 0; // number of the newest question; older answers are dropped
let waiting = null; // the image that a token is asked for
let picture = "";

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  let reply, body;
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    reply = await fetch(path, { ...options, headers, signal, cache: "no-store" });
    body = await reply.json();
  } catch (error) {
    if (reply && !(error instanceof TypeError)) {
      throw new Refused(reply.status, `The service answered ${reply.status} in a form this page does not know.`);
    }
    throw new Refused(0, "The service does not answer. It may have stopped, or the network is down; " +
      "try again once it is back.");
  }
  if (!reply.ok) throw new Refused(reply.status, body.error?.message ?? `The service answered ${reply.status}.`);
  return body;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function bar(share) {
  const made = element("span", undefined, "bar"), fill = element("i");
  fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  made.append(fill, element("b", percent(share)));
  return made;
}

function row(...cells) {
  const made = element("tr");
  made.append(...cells);
  return made;
}

function cell(content, className) {
  const made = element("td", undefined, className);
  made.append(content);
  return made;
}

function heading(text, scope = "row") {
  const made = element("th", text);
  made.scope = scope;
  return made;
}

// -- the model's card ---------------------------------------------------------------------------

async function readCard() {
  try {
    showCard(await ask("model"));
    return true;
  } catch (error) {
    if (error.status === 401) askForToken();
    else if (error.status === 503) setTimeout(readCard, 1000);
    else showError(error.message);
    return false;
  }
}

function figure(value) {
  const made = element("td");
  if (typeof value?.value !== "number") {
    made.textContent = "not measured";
  } else {
    made.append(percent(value.value), " ",
      element("span", `(${percent(value.low).slice(0, -1)} to ${percent(value.high)})`));
  }
  return made;
}

function verdict(report) {
  if (report === undefined) return "not shown by this service";
  if (!report) return "not verified: no report lies beside this model";
  return report.verdict === "VALID" ? "VALID" : `${report.verdict}: do not rely on the figures below`;
}

function showCard(found) {
  card = found;
  const { report } = card;
  const [channels, height, width] = card.input_shape;
  find("title").textContent = card.name;
  document.title = `${card.name} - DVERGE Serve`;
  const clean = report?.clean_accuracy;
  const labels = card.labels.slice(0, MOST_LABELS).join(", ");
  const more = card.labels.length > MOST_LABELS ? ` and ${card.labels.length - MOST_LABELS} more` : "";
  const facts = [
    ["Verification", verdict(report)],
    ...(clean ? [["Clean accuracy",
      `${percent(clean.value)} (${percent(clean.low)} to ${percent(clean.high)}, ${clean.n} images)`]] : []),
    ["Classes", `${card.labels.length}: ${labels}${more}`],
    ["Input", `${width}x${height}, ${channels === 1 ? "grayscale" : "colour"}`],
    ["Members", `${card.members}, answering by the mean of their logits`],
    ["Trained on", card.dataset],
    ["sha256", card.sha256],
  ];
  find("facts").replaceChildren(...facts.map(([name, text]) => row(heading(name), element("td", text))));
  const rows = report?.robust_accuracy ?? [];
  find("robust-block").hidden = !rows.length;
  const head = element("thead"), body = element("tbody");
  head.append(row(...["eps", "Transfer", "White-box"].map((name) => heading(name, "col"))));
  body.append(...rows.map((one) => row(heading(one.eps), figure(one.transfer), figure(one.white_box))));
  find("robust").replaceChildren(head, body);
  find("card").hidden = false;
  find("examples").hidden = !takesExamples();
  showAttacked();
}

function takesExamples() {
  // Drawn digits say nothing to a model of other things.
  return card.input_shape.join() === "1,8,8" &&
    card.labels.length === 10 && [..."0123456789"].every((digit) => card.labels.includes(digit));
}

// -- attacked images that the report keeps --------------------------------------------------------

async function showAttacked() {
  let found = null;
  try {
    found = await ask("examples");
  } catch {
    // Most services have none, or do not show them; the page is whole without.
  }
  find("attacked").hidden = !Array.isArray(found?.images);
  if (find("attacked").hidden) return;
  find("attacked-hint").textContent = "Test images, and the same ones changed by at most " +
    `${found.eps} a pixel so that a model without a defence (the control) answers wrongly. They were ` +
    "chosen by the control's answers alone. Click one to ask this service.";
  const head = element("thead"), body = element("tbody");
  head.append(row(...["Clean", "Attacked", "Right", "Control", "Model"].map((name) => heading(name, "col"))));
  body.append(...found.images.map((one) => row(
    cell(exampleButton(one.clean, `a clean '${one.label}'`)),
    cell(exampleButton(one.attacked, `an attacked '${one.label}'`)),
    element("td", one.label),
    answerCell(one.control_answer, one.label),
    answerCell(one.answer, one.label))));
  find("attacked-rows").replaceChildren(head, body);
}

function exampleButton(picture, words) {
  const made = element("button", undefined, "example"), shown = element("img");
  made.type = "button";
  made.title = words;
  shown.alt = words;
  shown.src = `data:image/png;base64,${picture}`;
  made.append(shown);
  made.addEventListener("click", () => classifyExample(made));
  return made;
}

function answerCell(answer, right) {
  return element("td", answer === right ? answer : `\u2260 ${answer}`, answer === right ? "" : "wrong");
}

// -- the token ----------------------------------------------------------------------------------

function askForToken() {
  const hint = find("token-message");
  if (token) hint.textContent = "The service does not accept this token.";
  token = "";
  find("token-form").hidden = false;
  find("token").focus();
}

find("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  token = find("token").value.trim();
  if (!/^[!-~]+$/.test(token)) {
    find("token-message").textContent = "A token is printable ASCII without spaces.";
    return;
  }
  if (!await readCard()) return;
  find("token-form").hidden = true;
  find("token").value = "";
  const image = waiting;
  waiting = null;
  if (image) classify(image);
  else find("file").focus();
});

// -- one image ----------------------------------------------------------------------------------

function reveal(what) {
  // On a narrow screen the answer is below the examples, out of sight.
  if (what.getBoundingClientRect().bottom > innerHeight) find("answer-title").scrollIntoView();
}

function showError(message) {
  find("answer").hidden = true;
  find("status").replaceChildren(element("p", message, "error"));
  reveal(find("status"));
}

async function classify(image) {
  const number = ++latest;
  find("status").replaceChildren(element("p", "Asking ...", "hint"));
  try {
    // Some browsers learn that a file is gone or a folder only when they read it.
    const bytes = await image.arrayBuffer().catch(() => {
      throw new Refused(0, "This file cannot be read; choose a PNG, JPEG or WebP image.");
    });
    // The content decides what the bytes are, not the name of the file.
    const reply = await ask("predict", {
      method: "POST", body: bytes, headers: { "Content-Type": "application/octet-stream" },
    });
    if (number !== latest) return;
    showAnswer(reply.predictions[0], image);
    if (card?.sha256 !== reply.model.sha256) readCard(); // reloaded meanwhile
  } catch (error) {
    if (number !== latest) return;
    showError(error instanceof Refused ? error.message : `This page failed: ${error}`);
    if (error.status === 401) {
      waiting = image;
      askForToken();
    }
  }
}

function showAnswer(found, image) {
  URL.revokeObjectURL(picture);
  picture = URL.createObjectURL(image);
  find("picture").src = picture;
  find("label").textContent = found.label;
  find("label").className = found.label.length > 16 ? "long" : "";
  find("probability").textContent = "probability" in found ? `Probability ${percent(found.probability)}` : "";
  find("top-block").hidden = !found.top;
  find("top").replaceChildren(
    ...(found.top ?? []).map((one) => row(heading(one.label), cell(bar(one.probability)))));
  showVotes(found);
  showAlarm(found);
  find("withheld").textContent = found.votes ? "" : found.top
    ? "This service keeps the members' votes to itself."
    : "This service tells the label alone.";
  const probability = "probability" in found ? `, ${percent(found.probability)}` : "";
  const alarm = find("alarm").hidden ? "" : ` ${find("alarm").textContent}`;
  find("status").replaceChildren(element("p", `Answered: ${found.label}${probability}.${alarm}`, "spoken"));
  find("answer").hidden = false;
  reveal(find("probability"));
}

function showVotes(found) {
  const votes = found.votes ?? [];
  find("votes-block").hidden = !found.votes;
  const agreeing = votes.filter((vote) => vote.index === found.index).length;
  find("agreement").textContent = agreeing === votes.length
    ? `All ${votes.length} members give this answer (agreement 100%).`
    : `${agreeing} of ${votes.length} members give this answer ` +
      `(agreement ${(100 * found.agreement).toFixed(0)}%).`;
  find("votes").replaceChildren(...votes.map((vote, member) => {
    const differs = vote.index !== found.index;
    const name = heading();
    name.append(element("span", "Member "), String(member + 1));
    const made = row(name, cell(differs ? `\u2260 ${vote.label}` : vote.label, "vote"), cell(bar(vote.probability)));
    if (differs) made.className = "differs";
    return made;
  }));
}

function showAlarm(found) {
  const alarm = find("alarm");
  alarm.hidden = !("disagreement" in found);
  if (found.suspicious) {
    alarm.className = "suspicious";
    alarm.textContent = "Suspicious: the members disagree more about this image than about nearly all " +
      "ordinary ones. Attacked images often look like that; do not trust this answer.";
  } else if (found.suspicious === false) {
    alarm.className = "";
    alarm.textContent = "Not suspicious: the members disagree no more than they do about ordinary images.";
  } else {
    alarm.className = "unknown";
    alarm.textContent = "No alarm is set: no report on this model tells how much its members " +
      "usually disagree.";
  }
}

// -- where images come from ---------------------------------------------------------------------

find("picture").addEventListener("load", ({ target }) => {
  target.className = Math.max(target.naturalWidth, target.naturalHeight) < 104 ? "small" : "";
});

find("file").addEventListener("change", ({ target }) => {
  if (target.files.length) classify(target.files[0]);
  target.value = ""; // the same file may be chosen again
});

function classifyExample(button) {
  const [, data] = button.firstChild.src.split(",");
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  classify(new Blob([bytes], { type: "image/png" }));
}

for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => classifyExample(button));
}

// Over all the page: a picture dropped beside the field must not take the browser away from it.
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", name === "dragover");
    if (name !== "drop") return;
    const [image] = event.dataTransfer.files;
    if (image) classify(image);
    else showError("What was dropped is not a file; save the image first, then drop it.");
  });
}

document.addEventListener("paste", (event) => {
  const [image] = event.clipboardData.files;
  if (image) classify(image);
});

readCard();
