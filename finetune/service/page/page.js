"use strict";
const PART = 8 * 1024 * 1024;
const find = (id) => document.getElementById(id);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

/* An answer's JSON, or an error that says what was found and what to do. */
async function call(method, path, body, headers = {}) {
  const answer = await fetch(path, { method, body, headers });
  const text = await answer.text();
  const value = text ? JSON.parse(text) : {};
  if (!answer.ok) throw new Error(`${value.detail || answer.status}. ${value.fix || ""}`);
  return value;
}

/* --- a picture or an archive that is dropped or chosen --- */

function takeFile(area, take) {
  const input = find("file");
  input.addEventListener("change", () => input.files[0] && take(input.files[0]));
  for (const kind of ["dragenter", "dragover"]) {
    area.addEventListener(kind, (event) => { event.preventDefault(); area.classList.add("over"); });
  }
  for (const kind of ["dragleave", "drop"]) area.addEventListener(kind, () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}

/* --- uploads, which go on where the network was lost --- */

async function upload(file, tell) {
  const name = btoa(String.fromCharCode(...new TextEncoder().encode(file.name)));
  const begun = await fetch("/v1/uploads", {
    method: "POST", headers: { "Upload-Length": String(file.size), "Upload-Metadata": `filename ${name}` },
  });
  if (!begun.ok) throw new Error((await begun.json()).detail);
  const address = begun.headers.get("location");
  let done = 0;
  let failures = 0;
  while (done < file.size) {
    tell(done / file.size);
    try {
      const sent = await fetch(address, {
        method: "PATCH", body: file.slice(done, done + PART),
        headers: { "Upload-Offset": String(done), "Content-Type": "application/offset+octet-stream" },
      });
      if (!sent.ok) throw new Error((await sent.json()).detail);
      done = Number(sent.headers.get("upload-offset"));
      failures = 0;
    } catch (error) {
      failures += 1;
      if (failures > 5) throw error;
      await wait(500 * 2 ** failures);
      const asked = await fetch(address, { method: "HEAD" }).catch(() => null);
      if (asked && asked.ok) done = Number(asked.headers.get("upload-offset"));
    }
  }
  tell(1);
  return call("POST", `/v1/datasets?upload=${address.split("/").pop()}`);
}

function startHome() {
  takeFile(find("drop"), async (file) => {
    const bar = find("sent");
    bar.hidden = false;
    try {
      const dataset = await upload(file, (share) => {
        bar.value = share;
        find("sending").textContent = `sending ${file.name}: ${Math.round(100 * share)} %`;
      });
      location.href = `/datasets/${dataset.id}`;
    } catch (error) {
      bar.hidden = true;
      find("sending").textContent = error.message;
    }
  });
}

/* --- what is going on --- */

function showProgress(progress) {
  find("phase").textContent = progress.phase || "";
  const bar = find("done");
  if (progress.total) { bar.max = progress.total; bar.value = progress.done; } else bar.removeAttribute("value");
  const left = find("left");
  const seconds = progress.run_seconds_left ?? progress.seconds_left;
  if (left) left.textContent = seconds == null ? "" : `about ${describe(seconds)} left`;
}

function describe(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

async function startDataset() {
  const form = find("start");
  if (form) form.addEventListener("submit", (event) => { event.preventDefault(); submitJob(form); });
  const state = find("state");
  while (state.textContent === "checking") {
    await wait(1000);
    const dataset = await call("GET", `/v1/datasets/${state.dataset.id}`).catch(() => null);
    if (dataset && dataset.progress) showProgress(dataset.progress);
    if (dataset && dataset.state !== "checking") location.reload();
  }
}

async function submitJob(form) {
  const recipe = { data: { path: `dataset:${form.dataset.dataset}` } };
  let label = "";
  for (const [key, value] of new FormData(form)) {
    if (key === "label") { label = value; continue; }
    if (value === "") continue;
    const [section, name] = key.split(".");
    (recipe[section] ||= {})[name] = key === "training.epochs" ? Number(value) : value;
  }
  const key = crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}`;
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
    const job = await call("POST", `/v1/jobs?label=${encodeURIComponent(label)}`, JSON.stringify(recipe), headers);
    location.href = `/jobs/${job.id}`;
  } catch (error) {
    find("refused").textContent = error.message;
    button.disabled = false;
  }
}

function startJob() {
  const state = find("state");
  const promote = find("promote");
  if (promote) promote.addEventListener("submit", (event) => { event.preventDefault(); promoteJob(promote); });
  if (state.dataset.over === "yes") return;
  const events = new EventSource(`/v1/jobs/${state.dataset.id}/events`);
  let epoch = 0;
  events.addEventListener("state", (event) => {
    const found = JSON.parse(event.data);
    state.textContent = found.state;
    state.className = `state ${found.state}`;
    find("attempt").textContent = found.attempt;
    if (["succeeded", "failed", "cancelled"].includes(found.state)) { events.close(); location.reload(); }
  });
  events.addEventListener("progress", (event) => {
    const progress = JSON.parse(event.data);
    showProgress(progress);
    const last = progress.metrics ? progress.metrics.epoch : 0;
    if (last === epoch) return;
    epoch = last;
    find("curves").hidden = false;
    for (const image of find("curves").children) image.src = `${image.dataset.address}?epoch=${epoch}`;
  });
  followLog(state.dataset.id);
}

async function followLog(job) {
  const lines = find("lines");
  for (;;) {
    await wait(2000);
    const answer = await fetch(`/v1/jobs/${job}/logs`).catch(() => null);
    if (!answer || !answer.ok) continue;
    const atEnd = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 8;
    lines.textContent = (await answer.text()).slice(-20000);
    if (atEnd) lines.scrollTop = lines.scrollHeight;
  }
}

async function promoteJob(form) {
  const name = new FormData(form).get("name");
  try {
    const body = JSON.stringify({ job: form.dataset.job });
    await call("PUT", `/v1/models/${encodeURIComponent(name)}`, body, { "Content-Type": "application/json" });
    location.href = `/models/${encodeURIComponent(name)}`;
  } catch (error) {
    find("refused").textContent = error.message;
  }
}

/* --- a picture on a model --- */

function startModel() {
  const area = find("try");
  takeFile(area, async (file) => {
    const refused = find("refused");
    refused.textContent = "";
    const form = new FormData();
    form.append("image", file);
    try {
      const path = `/v1/models/${encodeURIComponent(area.dataset.model)}/predict`;
      const [found] = (await call("POST", path, form)).predictions;
      if (found.fault) throw new Error(found.fault);
      find("seen").src = URL.createObjectURL(file);
      const rows = found.top ? found.top.map(drawClass) : [drawNumber(found.value)];
      find("classes").replaceChildren(...rows);
      find("answer").hidden = false;
    } catch (error) {
      find("answer").hidden = true;
      refused.textContent = error.message;
    }
  });
}

function drawNumber(number) {
  const row = document.createElement("li");
  row.textContent = number.toPrecision(4);
  return row;
}

function drawClass(one) {
  const row = document.createElement("li");
  const label = document.createElement("span");
  const value = document.createElement("span");
  const bar = document.createElement("progress");
  label.textContent = one.label;
  value.textContent = `${(100 * one.probability).toFixed(1)} %`;
  bar.value = one.probability;
  bar.setAttribute("aria-hidden", "true");
  row.append(label, value, bar);
  return row;
}

for (const button of document.querySelectorAll("button[data-post]")) {
  button.addEventListener("click", async () => {
    button.disabled = true;
    await call("POST", button.dataset.post).catch(() => null);
    location.reload();
  });
}
const START = { home: startHome, dataset: startDataset, job: startJob, model: startModel };
if (START[document.body.dataset.page]) START[document.body.dataset.page]();
