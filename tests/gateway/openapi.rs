//! The OpenAPI document says what the gateway does: all of it, and nothing else.

use std::collections::BTreeSet;

use reqwest::{Client, Method, Response, StatusCode};
use serde_json::Value;
use tempfile::TempDir;

use crate::gateway::{Gateway, text};

const METHODS: [&str; 5] = ["get", "put", "post", "delete", "patch"];

/// A gateway over a store of its own, and its document.
struct Documented {
    gateway: Gateway,
    client: Client,
    document: Value,
    _folder: TempDir,
}

impl Documented {
    async fn start() -> Self {
        Documented::start_with(None).await
    }

    /// Starts a gateway that lets in only those who have a token of `tokens`.
    async fn start_with(tokens: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let source = format!("sqlite:{}", text(&folder.path().join("pipes.db")));
        let file = text(&folder.path().join("tokens"));
        let gateway = match tokens {
            None => Gateway::start(&source, &[]),
            Some(tokens) => {
                std::fs::write(&file, tokens).expect("the tokens");
                Gateway::start(&source, &["--token-file", &file])
            }
        };
        // Built anew it asks for rustls's provider, which a plain connection does not need.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().no_proxy().build().expect("a client");
        let mut documented = Documented {
            gateway,
            client,
            document: Value::Null,
            _folder: folder,
        };
        let answer = documented.ask("get", "/openapi.json", "topic").await;
        assert_eq!(answer.headers()["content-type"], "application/json");
        let bytes = answer.bytes().await.expect("the document");
        documented.document = serde_json::from_slice(&bytes).expect("JSON");
        documented
    }

    fn paths(&self) -> impl Iterator<Item = (&str, &Value)> {
        let paths = self.document["paths"].as_object().expect("paths");
        paths.iter().map(|(path, item)| (path.as_str(), item))
    }

    /// Path, method and what the document says of them.
    fn operations(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        self.paths().flat_map(|(path, item)| {
            let methods = METHODS.iter().filter(|method| item[**method].is_object());
            methods.map(move |method| (path, *method, &item[*method]))
        })
    }

    /// Follows a reference; what is none is itself.
    fn resolve<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value["$ref"].as_str() {
            Some(place) => {
                let place = place.strip_prefix('#').expect("a reference to here");
                self.document.pointer(place).expect(place)
            }
            None => value,
        }
    }

    /// Sends a request to `pipe`; every push is of one line.
    async fn ask(&self, method: &str, path: &str, pipe: &str) -> Response {
        let path = path.replace("{pipe}", pipe);
        let url = format!("{}{path}", self.gateway.url().trim_end_matches('/'));
        let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("a method");
        let request = match method.as_str() {
            "POST" | "PUT" => self.client.request(method, url).body("one\n"),
            _ => self.client.request(method, url),
        };
        request.send().await.expect("an answer")
    }

    /// The answer is one that the document names: its status, its type, the members that it requires.
    async fn check(&self, operation: &Value, answer: Response) {
        let what = answer.url().to_string();
        let status = answer.status().as_u16().to_string();
        let documented = self.resolve(&operation["responses"][&status]);
        assert!(!documented.is_null(), "{what}: {status} is not documented");
        let Some(content) = documented["content"].as_object() else {
            assert!(answer.headers().get("content-type").is_none(), "{what}");
            assert!(answer.bytes().await.expect("a body").is_empty(), "{what}");
            return;
        };
        let kind = answer.headers()["content-type"].to_str().expect("a type");
        let kind = kind.split(';').next().expect("a type").to_owned();
        let media = content.get(&kind);
        let media = media.unwrap_or_else(|| panic!("{what}: {kind} is not documented"));
        let body = answer.bytes().await.expect("a body");
        if ["application/json", "application/problem+json"].contains(&kind.as_str()) {
            let body: Value = serde_json::from_slice(&body).expect("JSON");
            self.fits(&media["schema"], &body, &what);
        }
    }

    /// `body` has the type and the members, in depth, that the schema requires.
    fn fits(&self, schema: &Value, body: &Value, what: &str) {
        let schema = self.resolve(schema);
        match schema["type"].as_str() {
            Some("array") => {
                let items = body.as_array().expect(what);
                for item in items {
                    self.fits(&schema["items"], item, what);
                }
            }
            Some("object") => {
                let body = body.as_object().expect(what);
                let required = schema["required"].as_array().into_iter().flatten();
                for name in required.filter_map(Value::as_str) {
                    assert!(body.contains_key(name), "{what}: there is no {name}");
                }
                if schema["properties"].is_null() {
                    return;
                }
                for (name, value) in body {
                    let known = schema["properties"].get(name);
                    let known = known.unwrap_or_else(|| panic!("{what}: {name} is not documented"));
                    self.fits(known, value, what);
                }
            }
            Some("string") => assert!(body.is_string(), "{what}: {body}"),
            Some("integer") => assert!(body.is_u64(), "{what}: {body}"),
            Some("boolean") => assert!(body.is_boolean(), "{what}: {body}"),
            _ => {}
        }
    }
}

const MESSAGES: &str = "/v1/pipes/{pipe}/messages";

#[tokio::test]
async fn every_operation_answers_as_the_document_says() {
    let documented = Documented::start().await;
    for (path, method, operation) in documented.operations() {
        let pushed = documented.ask("post", MESSAGES, "topic").await;
        assert_eq!(pushed.status(), StatusCode::OK);
        let answer = documented.ask(method, path, "topic").await;
        assert!(answer.status().is_success(), "{method} {path}: {answer:?}");
        documented.check(operation, answer).await;
        if !path.contains("{pipe}") {
            continue;
        }
        let answer = documented.ask(method, path, ".hidden").await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{method} {path}");
        documented.check(operation, answer).await;
        // Whether or not it minds that there is no such pipe.
        let answer = documented.ask(method, path, "none").await;
        let minds = operation["responses"]["404"].is_object();
        assert_eq!(answer.status() == 404, minds, "{method} {path}");
        documented.check(operation, answer).await;
        let _ = documented.ask("delete", "/v1/pipes/{pipe}", "none").await;
    }
}

#[tokio::test]
async fn every_other_method_is_refused_with_405() {
    let documented = Documented::start().await;
    let problem = &documented.document["components"]["schemas"]["Problem"];
    for (path, item) in documented.paths() {
        for method in METHODS.iter().filter(|method| item[**method].is_null()) {
            let answer = documented.ask(method, path, "topic").await;
            assert_eq!(answer.status(), 405, "{method} {path}");
            // RFC 9110, 15.5.6: it must say what is allowed.
            let allowed = answer.headers()["allow"].to_str().expect("methods");
            let allowed: BTreeSet<String> = allowed.split(',').map(str::to_lowercase).collect();
            let listed = METHODS.iter().filter(|method| item[**method].is_object());
            let mut listed: BTreeSet<String> = listed.map(|method| (*method).to_owned()).collect();
            if listed.contains("get") {
                listed.insert("head".to_owned());
            }
            assert_eq!(allowed, listed, "{path}");
            let body = answer.bytes().await.expect("a body");
            let body = serde_json::from_slice(&body).expect("JSON");
            documented.fits(problem, &body, path);
        }
    }
}

#[tokio::test]
async fn who_has_no_token_is_told_so_as_documented() {
    let documented = Documented::start_with(Some("a-token-of-the-tests\n")).await;
    for (path, method, operation) in documented.operations() {
        let answer = documented.ask(method, path, "topic").await;
        let open = operation["security"]
            .as_array()
            .is_some_and(|ways| ways.is_empty());
        assert_eq!(answer.status() == 401, !open, "{method} {path}");
        documented.check(operation, answer).await;
    }
}

#[tokio::test]
async fn the_greatest_positions_are_answered() {
    let documented = Documented::start().await;
    let pushed = documented.ask("post", MESSAGES, "topic").await;
    let pushed: Value =
        serde_json::from_slice(&pushed.bytes().await.expect("a body")).expect("JSON");
    let (epoch, _) = pushed["position"]
        .as_str()
        .and_then(|position| position.split_once('-'))
        .expect("a position");
    let greatest = format!("{epoch}-{}", u64::MAX);
    let beyond = format!("{0}-{0}", u64::MAX);
    for query in [
        format!("messages?after={greatest}"),
        format!("messages?from={greatest}"),
        format!("messages?after={greatest}&wait=0"),
        format!("messages?after={greatest}&before={beyond}"),
    ] {
        let path = format!("/v1/pipes/{{pipe}}/{query}");
        let answer = documented.ask("get", &path, "topic").await;
        assert_eq!(answer.status(), StatusCode::OK, "{query}");
        assert_eq!(answer.text().await.expect("a body"), "", "{query}");
    }
    let path = format!("/v1/pipes/{{pipe}}/bounds?after={greatest}&before={beyond}");
    let answer = documented.ask("get", &path, "topic").await;
    let bounds: Value =
        serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON");
    assert_eq!(bounds["more"], false);
}

#[tokio::test]
async fn every_route_of_the_code_is_in_the_document() {
    let documented = Documented::start().await;
    let source = include_str!("../../src/gateway/routes.rs");
    let routes = source.split(".route(").skip(1).map(|rest| {
        let path = rest.trim_start().strip_prefix('"');
        path.and_then(|path| path.split_once('"'))
            .expect("a path in quotes")
            .0
    });
    let routes: BTreeSet<&str> = routes.collect();
    let paths: BTreeSet<&str> = documented.paths().map(|(path, _)| path).collect();
    assert_eq!(routes, paths);
}
