import { createTogetherAI } from "@ai-sdk/togetherai";
import { rerank } from "ai";

const provider = createTogetherAI({ baseURL: "http://host:6006/v1", apiKey: "<token>" });
const { rerankedDocuments } = await rerank({
  model: provider.reranking("any"),
  query,
  documents: documents.map((text, id) => ({ id, text })),
  providerOptions: { togetherai: { rankFields: ["text"] } },
});
rerankedDocuments.map(({ text }) => text);
