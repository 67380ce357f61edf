//! The API page, and how errors look wherever they come from.

use reqwest::Method;
use serde_json::json;

use crate::support::Stand;

/// What a page loads: the values of `src` and `href`.
fn loaded(html: &str) -> Vec<String> {
    ["src=\"", "href=\""]
        .iter()
        .flat_map(|attribute| html.split(attribute).skip(1))
        .filter_map(|rest| rest.split('"').next().map(str::to_owned))
        .collect()
}

#[tokio::test]
async fn the_api_page_needs_no_internet() {
    let stand = Stand::start(&[("API_KEYS", "worker:key-of-the-worker")]).await;
    let page = stand.get("/docs").await;
    assert_eq!(page.status.as_u16(), 200, "it leads to /docs/");
    assert!(page.header("content-type").unwrap().starts_with("text/html"));
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'self'") && !policy.contains("http"), "{policy}");
    let files = loaded(&page.text);
    assert!(files.len() >= 4, "{}", page.text);
    let mut scripts = 0;
    for file in &files {
        assert!(!file.contains("//"), "{file} is somewhere else");
        let reply = stand.get(&format!("/docs/{}", file.trim_start_matches("./"))).await;
        assert_eq!(reply.status.as_u16(), 200, "{file}");
        assert!(!reply.text.is_empty(), "{file}");
        let kind = reply.header("content-type").unwrap();
        scripts += usize::from(kind.contains("javascript"));
        assert!(
            kind.contains("javascript") || kind.contains("css") || kind.contains("png"),
            "{file} is {kind}"
        );
        if file.ends_with("initializer.js") {
            assert!(reply.text.contains("openapi.json"), "{}", reply.text);
            assert!(!reply.text.contains("://"), "{}", reply.text);
        }
    }
    assert!(scripts >= 3, "{files:?}");
    let document = stand.get("/openapi.json").await.ok();
    assert!(document["paths"]["/v1/query_chat"]["post"].is_object());
    stand.get("/docs/nothing.js").await.problem(404, "not_found");
    stand.get("/docs/../../etc/passwd").await.problem(404, "not_found");
    stand.get("/docs/%ff").await.problem(404, "not_found");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn every_refusal_is_a_problem() {
    let stand = Stand::start(&[("MAX_BODY_BYTES", "4096")]).await;
    let send = async |kind: &'static str, body: &'static str| {
        let request = stand.request(Method::POST, "/v1/query_chat").header("content-type", kind);
        stand.send(request.body(body)).await
    };
    let query = r#"{"query": "apple"}"#;
    for kind in
        ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"]
    {
        let detail = send(kind, query).await.problem(415, "unsupported_media_type");
        assert!(detail.contains("application/json"), "{detail}");
    }
    for kind in ["application/json", "APPLICATION/JSON; charset=utf-8", "application/vnd.atlas+json"] {
        send(kind, query).await.ok();
    }
    // A client that says nothing means JSON.
    stand.send(stand.request(Method::POST, "/v1/query_chat").body(query)).await.ok();

    let refused = stand.get("/v1/query_chat").await;
    refused.problem(405, "method_not_allowed");
    assert_eq!(refused.header("allow"), Some("POST"));
    stand.send(stand.request(Method::DELETE, "/health/live")).await.problem(405, "method_not_allowed");
    stand.send(stand.request(Method::PATCH, "/v1/documents")).await.problem(405, "method_not_allowed");
    stand.get("/v1/jobs/%ff").await.problem(400, "invalid_path");
    stand.get("/v1/jobs/a%2fb").await.problem(404, "unknown_job");
    stand.get("/v1/documents?collection=%ff").await.problem(422, "invalid_request");
    stand.get("/v1/documents?collection=a&collection=b").await.problem(422, "invalid_request");
    stand.get("/").await.problem(404, "not_found");
    let chunked = reqwest::Body::wrap_stream(futures_stream(vec![vec![b'['; 3000]; 3]));
    let request = stand.request(Method::POST, "/v1/embed_batch").body(chunked);
    stand.send(request).await.problem(413, "body_too_large");
    let late = json!({"query": "apple", "top_k": 1e3});
    stand.post("/v1/query_chat", late).await.problem(422, "invalid_request");
    stand.gateway.shutdown().await;
}

/// A body whose length is not announced.
fn futures_stream(
    parts: Vec<Vec<u8>>,
) -> impl futures::Stream<Item = Result<Vec<u8>, std::io::Error>> + Send + 'static {
    futures::stream::iter(parts.into_iter().map(Ok))
}
