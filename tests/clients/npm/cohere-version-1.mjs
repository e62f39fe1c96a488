import { CohereClient } from "cohere-ai";

const client = new CohereClient({ environment: "http://host:6006", token: "<token>" });
const objects = documents.map((text) => ({ text }));
const options = { rankFields: ["text"], maxChunksPerDoc: 2, returnDocuments: true };
const { results } = await client.rerank({ model: "any", query, documents: objects, ...options });
results.map(({ document }) => document.text);
