// What Node's own library can try: the host's files, the network, signals, other users.
const fs = require("fs");
const net = require("net");
const { spawnSync } = require("child_process");
const secret = process.argv[2];
for (const path of [secret, "/etc/shadow", "/proc/1/environ", "/proc/1/root" + secret, "/proc/self/root" + secret, "/dev/mem"]) {
  try {
    fs.readFileSync(path);
    console.log("read", path);
  } catch (error) {}
}
for (const path of ["/", "/usr", "/etc", "/dev"]) {
  try {
    fs.writeFileSync(path + "/mine", "");
    console.log("wrote below", path);
  } catch (error) {}
}
for (const attempt of [() => process.kill(1, "SIGKILL"), () => process.setuid(0), () => process.setgid(0)]) {
  try {
    attempt();
    console.log("an attempt succeeded", String(attempt));
  } catch (error) {}
}
if (String(spawnSync("su", ["-c", "id -u"]).stdout || "").trim() === "0") console.log("root");
const client = net.connect({ host: "127.0.0.1", port: 22 });
client.on("connect", () => (console.log("network"), process.exit()));
client.on("error", (error) => {
  // A refusal by the other side would mean that there is a network.
  console.log(["EPERM", "EACCES", "EAFNOSUPPORT"].includes(error.code) ? "held" : "network: " + error.code);
  process.exit();
});
