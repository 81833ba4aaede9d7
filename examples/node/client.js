// A stranger's client: only grpc-js and the .proto files. node client.js [HOST:PORT]
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const protos = new URL("../../proto", import.meta.url).pathname;
const definition = loader.loadSync(["fusionserve/v1/inference.proto", "fusionserve/v1/adapter.proto"], {
  includeDirs: [protos],
  keepCase: true,
  enums: String,
});
const { InferenceService, AdapterService } = grpc.loadPackageDefinition(definition).fusionserve.v1;
const target = process.argv[2] ?? "127.0.0.1:50051";
const inference = new InferenceService(target, grpc.credentials.createInsecure());
const adapters = new AdapterService(target, grpc.credentials.createInsecure());

function listAdapters() {
  return new Promise((resolve, reject) =>
    adapters.ListAdapters({}, (error, answer) => (error ? reject(error) : resolve(answer.adapters))),
  );
}

function stream(request) {
  const call = inference.StreamGenerate({ request });
  return new Promise((resolve, reject) => {
    call.on("data", (event) => {
      if (event.started) console.log(`started ${event.started.request_id} as ${event.started.adaptation.kind}`);
      if (event.chunk) process.stdout.write(event.chunk.text);
      if (event.finished) resolve(event.finished);
    });
    call.on("error", reject);
  });
}

for (const adapter of await listAdapters()) console.log(`${adapter.name.padEnd(10)} ${adapter.state}`);

const finished = await stream({
  text: "sub new {",
  adapter: { name: "perl" },
  sampling: { temperature: 0.7, seed: 3 },
  stopping: { max_new_tokens: 40 },
});
console.log(`\n${finished.candidates[0].finish_reason}, ${finished.usage.generated_tokens} tokens`);

await stream({ text: "x", adapter: { name: "no-such-adapter" } }).catch((error) =>
  console.log(`${grpc.status[error.code]}: ${error.details}`),
);
process.exit(0);
