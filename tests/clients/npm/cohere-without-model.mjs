import { CohereClient } from "cohere-ai";

const client = new CohereClient({ environment: "http://host:6006/api", token: "<token>" });
const { results } = await client.rerank({ query, documents });
results.map(({ index }) => index);
