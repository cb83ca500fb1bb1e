// New nodes keep their seed, so that queueing again means the same job. The nodes declare it
// (control_after_generate: "fixed"), but older pages start every seed with "randomize" all the same.
import { app } from "../../scripts/app.js";

const CONTROL = ["fixed", "increment", "decrement", "randomize"];

app.registerExtension({
  name: "StreamDiffVSR.seed",
  // Called for a node that is made; a saved workflow puts its own values in afterwards.
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("StreamDiffVSR_")) return;
    for (const widget of node.widgets ?? []) {
      if (String(widget.options?.values) === String(CONTROL)) widget.value = "fixed";
    }
  },
});
