import OpenAI from "openai";

const client = new OpenAI({ baseURL: "http://host:6006/v1", apiKey: "<token>" });
const [{ id }] = (await client.models.list()).data;
const model = (await client.models.retrieve(id)).id;
const { results } = await client.post("/rerank", { body: { model, query, documents } });
results.map(({ index }) => index);
