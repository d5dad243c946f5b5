// The stage grid of a pipeline: a row per stage, a column per member, colour by how busy it is there.
// Text only through textContent.
"use strict";

const COLUMNS_MAX = 12; // beyond this many members a stage lists only those that serve it

const pipelineOf = () => state.run.pipeline || null;
const isSteps = () => Boolean(pipelineOf()) && pipelineOf().mode === "sync";
const unit = () => (isSteps() ? "step" : "round");
const stageTitle = (one) => (one.stage === 0 ? "ends" : `stage ${one.stage}`);

// [word, why] if the stages are in trouble, else null. The words are the peer process's own.
function stageHealth() {
  const pipeline = pipelineOf();
  if (!pipeline || !(pipeline.trouble || []).length) return null;
  const states = pipeline.coverage.map((one) => one.state);
  const stalled = states.includes("lost") || states.includes("unserved");
  return [stalled ? "stalled" : "degraded", pipeline.trouble.join("; ")];
}

// The stage that everything waits for, if one stands out.
function bottleneck(coverage) {
  const busy = coverage.filter((one) => one.stage > 0 && Number.isFinite(one.busy));
  if (busy.length < 2) return "";
  const worst = busy.reduce((a, b) => (b.busy > a.busy ? b : a));
  const others = median(busy.filter((one) => one !== worst).map((one) => one.busy));
  if (worst.busy < 0.5 || worst.busy < 1.3 * others) return "";
  return `${stageTitle(worst)} is the bottleneck: its workers are busy ${percent(worst.busy)} of the time, the other stages' ${percent(others)}`;
}

function stageBadge(one) {
  const kind = { ok: "good", endangered: "warn", lost: "bad", unserved: "bad" }[one.state] || "";
  return node("span", `tag ${kind}`, one.state);
}

function memberCell(one, member, who) {
  if (!member) return node("div", "cell none");
  const kind = !member.present ? "away" : !member.ready ? "syncing" : "ready";
  const cell = node("div", `cell ${kind}`);
  cell.style.setProperty("--busy", String(Math.round(100 * Math.min(1, member.busy || 0))));
  const words = { away: "away", syncing: "syncing", ready: `${Math.round(100 * (member.busy || 0))} %` };
  cell.append(node("span", "who-name", nameOf(who, member.id)), node("span", "share", words[kind]));
  cell.title = clean(`${nameOf(who, member.id)} at ${stageTitle(one)}: ${kind}, busy ${percent(member.busy)}, ${(member.micro_batches_per_s || 0).toFixed(1)} micro-batches/s`);
  return cell;
}

function stageRow(one, members, who) {
  const label = node("div", "stage-label"), figures = node("div", "stage-figures");
  const name = node("div", "stage-name", stageTitle(one));
  name.append(stageBadge(one));
  const note = one.state === "lost" ? `${nameOf(who, one.host)} rebuilds it` : `${one.present} in reach, ${one.minimum} wanted`;
  label.append(name, node("div", "stage-note", note));
  label.title = clean(`${one.stage === 0 ? "embedding and head" : stageTitle(one)}: ${one.values} values, version ${one.version}, state ${short(one.state_hash)}`);
  const bar = node("div", "occupancy"), fill = node("span");
  fill.style.width = `${Math.round(100 * (one.busy || 0))}%`;
  bar.append(fill);
  const parts = [
    `${Number.isFinite(one.busy) ? `${Math.round(100 * one.busy)} % busy` : "–"}`,
    `${(one.micro_batches_per_s || 0).toFixed(1)} mb/s`,
    one.hop_s ? `hop ${seconds(one.hop_s.p50)}` : "",
    one.generation ? `rebuilt ${one.generation}×` : "",
  ];
  figures.append(bar, node("div", "stage-note", parts.filter(Boolean).join(" · ")));
  const byId = new Map(one.members.map((m) => [m.id, m]));
  return [label, ...members.map((id) => memberCell(one, byId.get(id), who)), figures];
}

function headCell(peer, who) {
  const out = node("div", "head-cell");
  const drives = peer.drives ? `drives ${peer.driving}` : "";
  const queued = peer.queued ? `${peer.queued} queued` : "";
  out.append(node("div", "head-name", nameOf(who, peer.id)), node("div", "stage-note", [drives, queued].filter(Boolean).join(" · ") || " "));
  out.title = clean(`${nameOf(who, peer.id)}: ${drives || "does not drive"}, ${peer.queued ?? 0} hops queued`);
  return out;
}

// How lost stages came back: what was installed, and what else was tried.
function drawRecoveries(pipeline, who) {
  $("recoveries").replaceChildren(...(pipeline.recoveries || []).slice(-4).reverse().map((one) => {
    const item = node("li");
    if (!one.choice) {
      item.append(node("b", "", `stage ${one.stage} was lost before step ${one.step}`), node("span", "", `${nameOf(who, one.host)} rebuilds it`));
      return item;
    }
    const tried = one.candidates.map((c) => `${c.name} ${Number.isFinite(c.loss) ? c.loss.toFixed(3) : "–"}`).join(", ");
    item.append(
      node("b", "", `stage ${one.stage} was rebuilt before step ${one.step}`),
      node("span", "", `by ${nameOf(who, one.host)} in ${seconds(one.back_wall_s - one.lost_wall_s)} from ${one.choice}; loss of those tried: ${tried}`),
    );
    return item;
  }));
}

function drawStages() {
  const pipeline = pipelineOf(), panel = $("stages-panel");
  panel.hidden = !pipeline;
  document.body.classList.toggle("pipeline", Boolean(pipeline));
  if (!pipeline) return;
  const who = names(), coverage = pipeline.coverage || [], box = $("stages");
  const rate = Number.isFinite(pipeline.micro_batches_per_s) ? `${pipeline.micro_batches_per_s.toFixed(1)} micro-batches/s · ` : "";
  $("stages-hint").textContent = `${rate}${isSteps() ? `step ${pipeline.step}, ` : ""}${pipeline.phase} · ${pipeline.boundary_codec} between stages · colour: busy in the last 10 s`;
  $("bottleneck").textContent = bottleneck(coverage);
  drawRecoveries(pipeline, who);
  if (!coverage.length) return placeholder(box, "no trainer has defined the model yet");
  const workers = state.peers.filter((p) => (p.stages || []).length || p.drives)
    .sort((a, b) => nameOf(who, a.id).localeCompare(nameOf(who, b.id), undefined, { numeric: true }));
  const wide = workers.length <= COLUMNS_MAX;
  box.className = wide ? "stage-grid" : "stage-grid chips";
  box.style.setProperty("--members", String(Math.max(1, workers.length)));
  const ids = workers.map((p) => p.id), cells = [];
  const row = (className, parts) => {
    const out = node("div", className);
    out.append(...parts);
    cells.push(out);
  };
  if (wide) row("stage-row stage-head", [node("div"), ...workers.map((p) => headCell(p, who)), node("div")]);
  for (const one of coverage) {
    const extra = one.members.map((m) => m.id).filter((id) => !ids.includes(id));
    row(`stage-row ${one.state}`, stageRow(one, wide && !extra.length ? ids : one.members.map((m) => m.id), who));
  }
  box.replaceChildren(...cells);
}
