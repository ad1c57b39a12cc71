// Keeps the figures of an open overview fresh. The page is complete without it.
//
// One request at a time, none while the page is hidden. The server formats every figure; this only puts text and
// path data into places that the page already has, so nothing a tenant is called can become markup.

const INTERVAL_MS = 2000;
const INTERVAL_MAX_MS = 30000; // after failures
const TIMEOUT_MS = 8000;

const page = document.querySelector("[data-live-url]");
const live = document.getElementById("live");
let delayMs = INTERVAL_MS;
let timer = 0;
let isBusy = false;

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function say(state, text, isStale) {
  live.hidden = false;
  live.dataset.state = state;
  setText(live, text);
  page.classList.toggle("is-stale", isStale);
}

function show(update) {
  if (update.layout !== page.dataset.layout) {
    location.reload(); // tenants came or went: the server draws the new table
    return;
  }
  for (const element of page.querySelectorAll("[data-field]")) {
    const text = update.fields[element.dataset.field];
    if (text !== undefined) setText(element, text);
  }
  for (const element of page.querySelectorAll("[data-state-of]")) {
    const state = update.states[element.dataset.stateOf];
    if (state !== undefined) element.dataset.state = state;
  }
  for (const element of page.querySelectorAll("[data-meter]")) {
    element.setAttribute("width", String(update.meters[element.dataset.meter] ?? 0));
  }
  for (const element of page.querySelectorAll("[data-chart]")) {
    const paths = update.charts[element.dataset.chart];
    if (paths !== undefined) element.setAttribute("d", paths[element.dataset.kind]);
  }
}

async function poll() {
  if (isBusy || document.hidden) return;
  isBusy = true;
  try {
    const response = await fetch(page.dataset.liveUrl, {
      cache: "no-store",
      credentials: "same-origin",
      redirect: "error",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    if (response.status === 401) {
      say("bad", "Session ended. Refresh to log in again.", true);
      return; // no further polls
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    show(answer);
    say("good", "Live", false);
    delayMs = INTERVAL_MS;
  } catch (error) {
    const isOurs = error instanceof Error && error.constructor === Error;
    say("warn", `${isOurs ? error.message : "The server does not answer."} Trying again.`, true);
    delayMs = Math.min(delayMs * 2, INTERVAL_MAX_MS);
  } finally {
    isBusy = false;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, delayMs);
}

if (page && live) {
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) poll();
  });
  poll();
}
