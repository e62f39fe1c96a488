// java Rerank.java URL TOKEN BODY: print status and body of a rerank, of a request without documents, of one with a wrong
// token, and of four times 64 reranks at once. The client is as the JDK makes it: it asks for an upgrade to HTTP/2.

import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.stream.Stream;

public class Rerank {
    static HttpRequest post(String url, String token, String body) {
        return HttpRequest.newBuilder(URI.create(url + "/v1/rerank"))
                .header("Authorization", "Bearer " + token)
                .header("Content-Type", "application/json")
                .POST(BodyPublishers.ofString(body))
                .build();
    }

    static void print(HttpResponse<String> response) {
        System.out.println(response.statusCode() + " " + response.body());
    }

    public static void main(String[] arguments) throws Exception {
        String url = arguments[0], token = arguments[1], body = arguments[2];
        HttpClient client = HttpClient.newHttpClient();
        HttpRequest rerank = post(url, token, body);
        for (HttpRequest request : List.of(rerank, post(url, token, "{\"query\": \"q\"}"), post(url, "wrong", body))) {
            print(client.send(request, BodyHandlers.ofString()));
        }
        for (int round = 0; round < 4; round++) {
            List<CompletableFuture<HttpResponse<String>>> pending =
                    Stream.generate(() -> client.sendAsync(rerank, BodyHandlers.ofString())).limit(64).toList();
            pending.forEach(response -> print(response.join()));
        }
    }
}
