// A network's widths in JavaScript, over one file of weights: node widths.mjs FOLDER NAME
// In a browser, fetch() takes the place of readFile.
import { readFile } from 'node:fs/promises';
import * as ort from 'onnxruntime-web';

const [folder, name] = process.argv.slice(2);
const path = `${name}.onnx.data`;
const data = await readFile(`${folder}/${path}`);

async function open(width) {
  const graph = await readFile(`${folder}/${name}_${width}.onnx`);
  return ort.InferenceSession.create(graph, { externalData: [{ path, data }] });
}

const sessions = {};
for (const width of ['w100', 'w075', 'w050', 'w025']) sessions[width] = await open(width);

const shape = [1, ...sessions.w100.inputMetadata[0].shape.slice(1)];
const images = new ort.Tensor('float32', new Float32Array(shape.reduce((a, b) => a * b)).fill(0.5), shape);
for (const [width, session] of Object.entries(sessions)) {
  const outputs = await session.run({ pixel_values: images }); // switched at run time, by taking another session
  const values = outputs[session.outputNames[0]].data;
  console.log(width, Array.from(values.slice(0, 3), (value) => value.toFixed(4)).join(' '));
}
