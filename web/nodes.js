import { app } from "../../scripts/app.js";

const CONTROL = ["fixed", "increment", "decrement", "randomize"];

// Queueing again shall mean the same job. The nodes declare that (control_after_generate: "fixed"), but
// older pages start every seed with "randomize" all the same.
function keepSeed(node) {
  for (const widget of node.widgets ?? []) {
    if (String(widget.options?.values) === String(CONTROL)) widget.value = "fixed";
  }
}

app.registerExtension({
  name: "StreamDiffVSR.nodes",
  // Called for a node that is made; a saved workflow puts its own values in afterwards.
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("StreamDiffVSR_")) keepSeed(node);
  },
});
