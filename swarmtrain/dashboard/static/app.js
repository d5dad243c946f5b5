// The page: one snapshot, then the sections that changed. Everything that came from a peer is set
// as text, never as markup.
"use strict";

const state = { source: {}, run: {}, peers: [], rounds: [], events: [], losses: [], timeline: [] };
const EVENTS_SHOWN = 200;
const $ = (id) => document.getElementById(id);

function node(tag, className, text) {
  const out = document.createElement(tag);
  if (className) out.className = className;
  if (text !== undefined && text !== null) out.textContent = clean(text);
  return out;
}
function bytes(count) {
  if (!Number.isFinite(count)) return "–";
  for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
    if (Math.abs(count) < 1000 || unit === "TB") return `${count.toFixed(unit === "B" || count >= 100 ? 0 : 1)} ${unit}`;
    count /= 1000;
  }
}
function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 120 ? `${value.toFixed(1)} s` : `${(value / 60).toFixed(1)} min`;
}
const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "–");
const short = (id) => (id ? String(id).slice(0, 8) : "none");
// Members choose their names: of those that chose the same one the id is shown, too.
function names() {
  const count = new Map();
  for (const p of state.peers) count.set(p.name, (count.get(p.name) || 0) + 1);
  const shown = (p) => (!p.name ? short(p.id) : count.get(p.name) > 1 ? `${p.name} ${short(p.id).slice(0, 4)}` : p.name);
  return new Map(state.peers.map((p) => [p.id, shown(p)]));
}
function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor((sorted.length - 1) / 2)] : NaN;
}

// Seconds between the newest commits, or NaN.
function commitEvery() {
  const times = state.rounds.filter((r) => r.outcome === "committed" && Number.isFinite(r.decided_wall_s))
    .map((r) => r.decided_wall_s).sort((a, b) => a - b).slice(-21);
  return median(times.slice(1).map((t, i) => t - times[i]));
}
function newestRound() {
  if (isSteps()) return pipelineOf().step;
  return Math.max(0, ...Object.values(state.run.channels || {}).map((c) => c.round || 0));
}
function utilization() {
  const pipeline = pipelineOf();
  if (pipeline) {
    const busy = state.peers.map((p) => p.busy).filter(Number.isFinite);
    return busy.length ? busy.reduce((a, b) => a + b, 0) / busy.length : NaN;
  }
  const values = state.peers.map((p) => (p.metrics || {}).compute_utilization).filter(Number.isFinite);
  if (values.length) return values.reduce((a, b) => a + b, 0) / values.length;
  return (state.run.trainer || {}).compute_utilization;
}
function health() {
  const run = state.run;
  if (run.ended && !state.source.connected) return ["ended", `the run ended: ${run.ended}`];
  if (!state.source.connected) return ["lost", state.source.error || "the peer process does not answer"];
  if (run.ended) return ["ended", `the run ended: ${run.ended}`];
  if (!run.leader) return ["stalled", "no majority of stewards answers; nothing commits until one does"];
  if (run.paused) return ["stalled", `paused: ${run.paused}`];
  const stages = stageHealth();
  if (stages && stages[0] === "stalled") return stages;
  if (run.disk_full && run.disk_full.length)
    return ["degraded", `the disk of this site is full: ${run.disk_full.join(", ")} not written`];
  if (run.syncing) return ["degraded", "this site is catching up with the run's state"];
  const away = (run.members || 0) - (run.connected || 0) - 1;
  if (away > 0 && run.members <= 32) return ["degraded", `${away} of ${run.members} members have no link to this site${stages ? `; ${stages[1]}` : ""}`];
  return stages || ["healthy", ""];
}
function lossTrend() {
  const last = state.losses.slice(-6).map((p) => p[1]);
  if (last.length < 2) return "";
  const change = last[last.length - 1] - last[0];
  return change < 0 ? " ↓" : change > 0 ? " ↑" : " →";
}
function lastLoss() {
  if (Number.isFinite(state.run.loss)) return state.run.loss;
  return state.losses.length ? state.losses[state.losses.length - 1][1] : NaN;
}
function warnings() {
  const since = Date.now() / 1000 - 600;
  return state.events.filter((e) => e.severity !== "info" && e.wall_s > since).length;
}

function drawHealth() {
  const run = state.run, [word, because] = health(), every = commitEvery(), loss = lastLoss();
  const parts = [`${isSteps() ? "Step" : "Round"} ${newestRound()}`, `${Math.min((run.connected || 0) + 1, run.members || 0)} of ${run.members || 0} peers`];
  if (Number.isFinite(every)) parts.push(`committing every ${seconds(every)}`);
  const pipeline = pipelineOf();
  if (pipeline && Number.isFinite(pipeline.micro_batches_per_s)) parts.push(`${pipeline.micro_batches_per_s.toFixed(1)} micro-batches/s`);
  if (Number.isFinite(loss)) parts.push(`loss ${loss.toFixed(3)}${lossTrend()}`);
  const count = warnings();
  if (count) parts.push(`${count} warning${count > 1 ? "s" : ""} in 10 min`);
  $("health-word").textContent = word;
  $("health-word").className = `badge ${word}`;
  $("sentence").textContent = run.run ? parts.join(" · ") : "Waiting for the first answer of the peer process.";
  $("because").textContent = clean(because);
  $("run-name").textContent = run.run ? clean(`${run.name || ""} · ${short(run.run)}`) : "";
  document.title = run.run ? `${word} · ${unit()} ${newestRound()} · swarmtrain` : "swarmtrain";
}
/* Where the data are dealt in shards. */
function dataCards(data) {
  if (!data || !data.samples) return [];
  const done = `${data.shards_done} of ${data.shards} shards`;
  const free = data.shards_free ? `, ${data.shards_free} to be dealt again` : "";
  return [card("epoch", String(data.epoch), done + free)];
}
function card(label, value, note) {
  const out = node("div", "card");
  out.append(node("div", "label", label), node("div", "value", value), node("div", "note", note || ""));
  return out;
}
function stageCards() {
  const pipeline = pipelineOf();
  if (!pipeline) return [];
  const good = pipeline.coverage.filter((one) => one.state === "ok").length;
  return [card("stages", `${good} of ${pipeline.coverage.length}`, `covered, ${pipeline.drivers.length} drive`)];
}
function drawCards() {
  const run = state.run, loss = lastLoss(), first = state.losses.length ? state.losses[0][1] : NaN;
  const trains = state.peers.filter((p) => p.trains).length;
  const total = (run.rounds_committed || 0) + (run.rounds_aborted || 0);
  const share = total ? `${percent(run.rounds_committed / total)} of tries` : "";
  $("cards").replaceChildren(
    card(unit(), String(newestRound()), `generation ${run.generation ?? "–"}`),
    card("peers", String(run.members ?? "–"), `${trains} train, ${(run.stewards || []).length} vote`),
    ...stageCards(),
    card("loss", Number.isFinite(loss) ? loss.toFixed(3) : "–", Number.isFinite(first) ? `from ${first.toFixed(3)}` : ""),
    card(`one ${unit()} takes`, seconds(commitEvery()), "median of 20"),
    card("committed", String(run.rounds_committed ?? "–"), share),
    card(pipelineOf() ? "workers busy" : "computing", percent(utilization()), pipelineOf() ? "mean, last 10 s" : "share of wall time"),
    ...dataCards(run.data),
    card("sent by this site", bytes(run.bytes_sent), `received ${bytes(run.bytes_received)}`),
  );
}
function stepFacts() {
  const pipeline = pipelineOf(), who = names();
  return [
    ["stages lost so far", pipeline.era],
    ["drivers", pipeline.drivers.map((id) => nameOf(who, id)).join(", ") || "none"],
    ["micro-batches", `${pipeline.micro_batches} a step`],
  ];
}
function drawFacts() {
  const run = state.run, who = names(), channels = Object.entries(run.channels || {});
  const facts = [
    ["leader", run.leader ? `${nameOf(who, run.leader)}${run.is_leader ? " (this site)" : ""}` : "none"],
    ["term", run.term],
    ["stewards", (run.stewards || []).map((id) => nameOf(who, id)).join(", ") || "none"],
    ...(isSteps() ? stepFacts() : []),
    ["overlap", run.overlap && !isSteps() ? `${run.overlap}${run.overlap_key === "auto" ? ", as measured" : ""}` : "–"],
    ["this site", `${run.site_name || ""} ${short(run.site)}`],
    ...channels.slice(0, isSteps() ? 0 : 8).map(([name, c]) => [name, `round ${c.round} · ${c.phase || ""}`]),
  ];
  if (channels.length && !isSteps()) facts.push(["state hash", short(channels[0][1].state_hash)]);
  const shown = facts.filter(([key]) => key !== "overlap" || !isSteps());
  $("facts").replaceChildren(...shown.flatMap(([key, value]) => [node("dt", "", key), node("dd", "", value ?? "–")]));
}
function cell(label, value, className) {
  const out = node("td", className || "");
  out.dataset.label = label;
  if (value instanceof Node) out.append(value);
  else out.textContent = clean(value ?? "–");
  return out;
}
function peerState(peer) {
  const mine = peer.id === state.run.site;
  if (!mine && !peer.connected) return node("span", "tag bad", "away");
  if (peer.syncing) return node("span", "tag warn", "syncing");
  if (peer.stages && peer.trains && !peer.stages.length) return node("span", "tag", "waiting");
  if (peer.stages && peer.stages.some((one) => !one.ready)) return node("span", "tag warn", "syncing");
  if (peer.trains) return node("span", "tag good", "training");
  return node("span", "tag", peer.holds_state ? "holding" : "serving");
}
function drawMembers() {
  const rows = state.peers.map((peer) => {
    const figures = peer.metrics || {}, row = node("tr");
    const role = peer.is_leader ? "leader" : peer.votes ? "steward" : "member";
    const via = peer.via ? `, relayed by ${short(peer.via)}` : "";
    const doubt = peer.reachability === "unknown" ? " (not tried)" : "";
    const at = (peer.addresses || []).join(", ") + doubt;
    const link = (peer.reachable === false ? "outgoing only" : at) + via;
    const id = node("span", "mono", short(peer.id));
    row.append(
      cell("name", `${peer.name || short(peer.id)}${peer.id === state.run.site ? " (this site)" : ""}`),
      cell("id", id), cell("state", peerState(peer)), cell("role", role),
      cell(unit(), peer.round, "num"),
      ...(peer.stages ? [
        cell("stages", peer.stages.map((one) => (one.stage ? one.stage : "ends")).join(", ") || "–", "num"),
        cell("busy", percent(peer.busy), "num"),
      ] : [
        cell("loss", Number.isFinite(figures.loss) ? figures.loss.toFixed(3) : "–", "num"),
        cell("computing", percent(figures.compute_utilization), "num"),
      ]),
      cell("up", bytes(figures.bytes_sent ?? figures.bytes_up), "num"),
      cell("down", bytes(figures.bytes_received ?? figures.bytes_down), "num"),
      cell("address", link || "–"),
      cell("seen", Number.isFinite(peer.last_report_age_s) ? `${seconds(peer.last_report_age_s)} ago` : "–", "num"),
    );
    return row;
  });
  $("members").tBodies[0].replaceChildren(...rows);
  const holds = state.peers.filter((p) => p.holds_state).length;
  $("members-hint").textContent = `${state.peers.length} members, ${holds} hold ${pipelineOf() ? "stages" : "the model"} · bytes are of the last ${unit()}`;
}
function stepResult(r) {
  if (!r.micro_batches) return "–";
  const loss = Number.isFinite(r.loss) ? `, loss ${r.loss.toFixed(3)}` : "";
  return `${r.micro_batches} micro-batches${loss}`;
}
function drawRounds() {
  const newest = [...state.rounds].sort((a, b) => (a.opened_wall_s || 0) - (b.opened_wall_s || 0));
  $("strip").replaceChildren(...newest.slice(-80).map((r) => {
    const mark = node("span", r.outcome);
    mark.title = clean(`${r.channel} #${r.round}.${r.attempt}: ${r.outcome}${r.reason ? `, ${r.reason}` : ""}`);
    return mark;
  }));
  const rows = newest.slice(-12).reverse().map((r) => {
    const row = node("tr"), kind = { committed: "good", aborted: "bad" }[r.outcome] || "";
    row.append(
      cell(unit(), `${r.channel === "steps" ? "" : r.channel} #${r.round}${r.attempt ? `.${r.attempt}` : ""}`),
      cell("outcome", node("span", `tag ${kind}`, r.outcome)),
      cell(isSteps() ? "workers" : "contributors", (r.contributors || []).length, "num"),
      cell("took", r.decided_wall_s ? seconds(r.decided_wall_s - (r.began_wall_s || r.opened_wall_s)) : "–", "num"),
      cell("bytes", bytes(r.bytes || NaN), "num"),
      cell("result", r.reason || (r.root ? short(r.root) : stepResult(r))),
    );
    return row;
  });
  $("rounds").tBodies[0].replaceChildren(...rows);
  $("rounds-hint").textContent = `${state.run.rounds_committed ?? 0} committed, ${state.run.rounds_aborted ?? 0} attempts aborted`;
}
const HEAD = new Set(["v", "seq", "wall_s", "mono_s", "site", "name", "severity", "code", "generation", "channel", "round", "attempt"]);
function eventDetail(record) {
  const parts = record.round === null || record.round === undefined ? [] : [`${record.channel || "round"} #${record.round}`];
  for (const [key, value] of Object.entries(record)) {
    if (HEAD.has(key) || value === null) continue;
    let text = String(value);
    if (Array.isArray(value) && value.length > 3) text = `${value.length} of them`;
    else if (Array.isArray(value)) text = value.map((one) => nameOf(names(), one)).join(", ");
    else if (typeof value === "object") text = JSON.stringify(value);
    if (/^[0-9a-f]{32,}$/.test(text)) text = nameOf(names(), text);
    else if (typeof value === "number" && !Number.isInteger(value)) text = value.toPrecision(4);
    parts.push(`${key} ${text.slice(0, 160)}`);
  }
  return parts.join(" · ");
}
function drawEvents() {
  const level = $("events-level").value;
  const shown = state.events.filter((e) => level === "all" || e.severity === "error" || e.severity === level);
  $("events").replaceChildren(...shown.slice(-EVENTS_SHOWN).reverse().map((record) => {
    const item = node("li", record.severity);
    item.append(
      node("time", "", new Date(record.wall_s * 1000).toLocaleTimeString([], { hour12: false })),
      node("span", "", `${String(record.name).replaceAll("_", " ")} · ${record.code}`),
      node("span", "detail", eventDetail(record)),
    );
    return item;
  }));
  if (!shown.length) $("events").replaceChildren(node("li", "empty", "nothing of this kind"));
}
// Who held the newest round with figures, and by which phase.
function slowest() {
  if (isSteps()) return ""; // the stage grid tells
  const newest = Math.max(...state.timeline.map((r) => r.round));
  const rows = state.timeline.filter((r) => r.round === newest);
  if (rows.length < 2) return "";
  let worst = ["", "", 0, 0];
  for (const phase of ["compute", "encode", "send", "receive", "reduce", "apply"]) {
    for (const row of rows) {
      const others = median(rows.filter((r) => r !== row).map((r) => r[`${phase}_s`] || 0));
      const excess = (row[`${phase}_s`] || 0) - others;
      if (excess > worst[2]) worst = [row.id, phase, excess, others];
    }
  }
  const every = commitEvery();
  if (!Number.isFinite(every) || worst[2] < 0.1 * every) return "";
  return `${nameOf(names(), worst[0])} held round ${newest} by ${seconds(worst[2])}: its ${worst[1]} took ${seconds(worst[2] + worst[3])}, the others' ${seconds(worst[3])}`;
}
function drawLegend() {
  const seen = new Set(state.timeline.flatMap(segmentsOf).map((segment) => segment[2]));
  $("legend").replaceChildren(...PHASES.filter((phase) => seen.has(phase)).map((phase) => {
    const item = node("li");
    item.append(node("span", phase), node("b", "", phase));
    return item;
  }));
}
function drawTimelinePanel() {
  drawLegend();
  drawTimeline($("timeline"), state.timeline, names(), Number($("timeline-rounds").value));
  $("slow").textContent = clean(slowest());
}
function drawLossPanel() {
  drawLoss($("loss"), state.losses, state.rounds.filter((r) => r.outcome === "aborted").map((r) => r.round));
}
// What is called a round elsewhere is a step where all stages of a pipeline take it together.
function drawWords() {
  const steps = isSteps(), one = unit(), many = `${one}s`;
  const words = {
    "loss-hint": `held-out set, nats per byte, by ${one}`,
    "timeline-title": steps ? "Step timeline" : "Round timeline",
    "timeline-hint": `above: compute · below: transfer, sent over received · dashed line: ${steps ? "step closed" : "round opened"}`,
    "timeline-unit": many, "rounds-title": steps ? "Steps" : "Rounds",
    "th-round": one, "th-rounds": one, "th-contributors": steps ? "workers" : "contributors",
    "th-loss": pipelineOf() ? "stages" : "loss", "th-busy": pipelineOf() ? "busy" : "computing",
  };
  for (const [id, text] of Object.entries(words)) $(id).textContent = text;
}
function drawLink() {
  const up = state.source.connected;
  const over = !up && state.run.ended;
  $("link-state").className = `link-state ${up ? "up" : over ? "" : "down"}`;
  $("link-text").textContent = up ? "live" : over ? "the run has ended" : "peer process not answering";
}

const PANELS = [
  [["source", "run"], drawLink],
  [["run"], drawWords],
  [["run", "peers"], drawStages],
  [["source", "run", "rounds", "losses", "events", "peers"], drawHealth],
  [["run", "rounds", "losses", "peers"], drawCards],
  [["run", "peers"], drawFacts],
  [["run", "peers"], drawMembers],
  [["run", "rounds"], drawRounds],
  [["events", "peers"], drawEvents],
  [["losses", "rounds"], drawLossPanel],
  [["timeline", "peers", "rounds"], drawTimelinePanel],
];
const changed = new Set();
let scheduled = false;
function schedule(sections) {
  sections.forEach((name) => changed.add(name));
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    for (const [wants, draw] of PANELS) if (wants.some((name) => changed.has(name))) draw();
    changed.clear();
  });
}
function take(delta) {
  for (const [name, value] of Object.entries(delta)) {
    if (name === "events") state.events = state.events.concat(value).slice(-500);
    else if (name === "losses") {
      const byRound = new Map(state.losses.concat(value));
      state.losses = [...byRound].sort((a, b) => a[0] - b[0]);
    } else state[name] = value;
  }
  schedule(Object.keys(delta));
}
function listen() {
  const stream = new EventSource("/events");
  stream.addEventListener("snapshot", (message) => {
    state.events = [];
    state.losses = [];
    take(JSON.parse(message.data));
  });
  stream.addEventListener("delta", (message) => take(JSON.parse(message.data)));
  stream.addEventListener("error", () => {
    $("link-state").className = "link-state down";
    $("link-text").textContent = "dashboard not answering, trying again";
  });
}

$("timeline-rounds").addEventListener("change", drawTimelinePanel);
$("events-level").addEventListener("change", drawEvents);
addEventListener("resize", () => schedule(["losses", "timeline"]));
listen();
