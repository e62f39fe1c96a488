// go run rerank.go URL TOKEN BODY: print status and body of a rerank, of a request without documents, of one with a wrong
// token, and of four times 64 reranks at once.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
)

// Go keeps two idle connections to a host by default, and closes the others after their response.
var client = http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

func post(url, token, body string) string {
	request, err := http.NewRequest("POST", url+"/v1/rerank", strings.NewReader(body))
	if err != nil {
		return err.Error()
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d %s", response.StatusCode, text)
}

func main() {
	url, token, body := os.Args[1], os.Args[2], os.Args[3]
	fmt.Println(post(url, token, body))
	fmt.Println(post(url, token, `{"query": "q"}`))
	fmt.Println(post(url, "wrong", body))
	for round := 0; round < 4; round++ {
		var responses [64]string
		var pending sync.WaitGroup
		for i := range responses {
			pending.Add(1)
			go func(i int) {
				defer pending.Done()
				responses[i] = post(url, token, body)
			}(i)
		}
		pending.Wait()
		fmt.Println(strings.Join(responses[:], "\n"))
	}
}
