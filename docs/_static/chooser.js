// Asks what is built and how many samples a batch has, and says which norm. The answers are in
// chooser.json, which the page holds; its address may answer: ?network=images&batch=2.
"use strict";

function answerOf(data, network, batch) {
  return data.answers.find(({networks, batch: range}) => {
    const [least, most] = range ?? [1, null];
    return networks.includes(network) && batch >= least && (most === null || batch <= most);
  });
}

document.addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("chooser");
  if (!place) return;
  const data = JSON.parse(document.getElementById("chooser-data").textContent);
  const [network, batch, output] = ["select", "input", "output"].map(kind => place.querySelector(kind));
  for (const {key, text} of data.networks) network.add(new Option(text, key));

  const given = new URLSearchParams(location.search);
  if (data.networks.some(({key}) => key === given.get("network"))) network.value = given.get("network");
  if (/^[1-9]\d*$/.test(given.get("batch"))) batch.value = given.get("batch");

  const show = () => {
    const samples = Math.max(1, Math.floor(Number(batch.value)) || 1);
    const answer = answerOf(data, network.value, samples);
    const norm = document.createElement("strong"), call = document.createElement("code");
    const why = document.createElement("p"), link = document.createElement("a");
    norm.textContent = answer.norm;
    call.textContent = answer.call;
    why.textContent = answer.why + " ";
    link.textContent = "The reasons";
    link.href = "#" + answer.section;
    why.append(link);
    output.replaceChildren(norm, why, call);
  };
  place.addEventListener("input", show);
  place.querySelector("form").addEventListener("submit", event => event.preventDefault());
  place.hidden = false;
  show();
  if (location.hash === "#chooser") place.scrollIntoView();
});
