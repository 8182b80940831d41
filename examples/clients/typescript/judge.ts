// Scores answers and judges a program.
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { durationMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { RetryInfoSchema } from "./generated/google/rpc/retry_info_pb.js";
import { Verdict } from "./generated/perigee/buffer/v1/buffer_pb.js";
import { RewardService, type ScoreResponse } from "./generated/perigee/reward/v1/reward_pb.js";
import { SandboxService, TestVerdict } from "./generated/perigee/sandbox/v1/sandbox_pb.js";

const { PERIGEE_REWARD_ADDRESS, PERIGEE_SANDBOX_ADDRESS, PERIGEE_TOKEN, PERIGEE_CA_FILE } = process.env;

const authorize: Interceptor = (next) => (request) => {
  if (PERIGEE_TOKEN) request.header.set("Authorization", `Bearer ${PERIGEE_TOKEN}`);
  return next(request);
};

function connect(address: string | undefined) {
  return createGrpcTransport({
    baseUrl: `${PERIGEE_CA_FILE ? "https" : "http"}://${address}`,
    nodeOptions: PERIGEE_CA_FILE ? { ca: readFileSync(PERIGEE_CA_FILE) } : {},
    interceptors: [authorize],
    defaultTimeoutMs: 300_000,
  });
}

/** Makes an idempotent call until the service has room for it, with the pauses that it asks for. */
async function callAgain<T>(call: () => Promise<T>, attempts = 8): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await call();
    } catch (thrown) {
      const error = ConnectError.from(thrown);
      if (attempt === attempts || ![Code.ResourceExhausted, Code.Unavailable].includes(error.code)) throw error;
      const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
      await sleep((delay ? durationMs(delay) : 100 * 2 ** attempt) * (1 + Math.random() / 2));
    }
  }
}

async function collect<T>(stream: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const each of stream) found.push(each);
  return found;
}

const reward = createClient(RewardService, connect(PERIGEE_REWARD_ADDRESS));
const sandbox = createClient(SandboxService, connect(PERIGEE_SANDBOX_ADDRESS));

const items = [
  ["a", "1/2 + 1/3 is \\boxed{5/6}"],
  ["b", "1/2 + 1/3 is \\boxed{2/5}"],
].map(([id, response]) => ({
  id,
  response,
  verifier: { case: "math" as const, value: { reference: "5/6" } },
}));
const outcomes = await callAgain(() => collect(reward.score({ items })));
const byId = new Map(outcomes.map((outcome): [string, ScoreResponse] => [outcome.id, outcome]));
for (const { id } of items) {
  const { verdict, reward: value, reason } = byId.get(id)!;
  // A response that was not judged has no reward, which is not 0.
  console.log(id, `VERDICT_${Verdict[verdict]}`, value ?? `none: ${reason}`);
}

const bytes = (text: string) => new TextEncoder().encode(text);
const judged = await callAgain(() =>
  sandbox.judge({
    language: "python",
    source: bytes("n = int(input())\nprint(n * n)"),
    tests: [
      ["2", "4"],
      ["3", "9"],
    ].map(([stdin, expected]) => ({
      kind: { case: "stdio" as const, value: { stdin: bytes(stdin), expectedStdout: bytes(expected) } },
    })),
  }),
);
console.log("square", `TEST_VERDICT_${TestVerdict[judged.verdict]}`, `${judged.passed} of ${judged.results.length} tests`);
