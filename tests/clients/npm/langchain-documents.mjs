import { Document } from "@langchain/core/documents";
import { CohereRerank } from "@langchain/cohere";
import { CohereClient } from "cohere-ai";

const client = new CohereClient({ environment: "http://host:6006", token: "<token>" });
const ranker = new CohereRerank({ client, model: "any" });
const ranked = await ranker.compressDocuments(documents.map((pageContent) => new Document({ pageContent })), query);
ranked.map(({ pageContent }) => pageContent);
