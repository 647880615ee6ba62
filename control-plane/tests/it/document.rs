//! The document of the API against the server.

use reqwest::{Method, StatusCode};
use selvage_certs::Role;

use crate::world::{World, json_of};

#[tokio::test]
async fn every_operation_of_the_document_is_served_and_guarded() {
    let world = World::start().await;
    let (ops, stranger) = (world.ops(), world.stranger());
    let document = json_of(ops.get("/api/v1/openapi.json").await, StatusCode::OK).await;
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().unwrap();
    let mut count = 0;
    for (path, operations) in paths {
        let filled = path.replace("{app}", "hello").replace("{node}", "fra-1").replace("{release}", "1");
        let filled = filled.replace("{name}", "token").replace("{id}", "0a");
        assert!(!filled.contains('{'), "{path}");
        for (method, operation) in operations.as_object().unwrap() {
            count += 1;
            assert!(operation["summary"].as_str().unwrap().ends_with('.'), "{method} {path}");
            let method: Method = method.to_uppercase().parse().unwrap();
            let answer = ops.ask(method.clone(), &filled).body("{}").send().await.unwrap();
            let status = answer.status();
            let text = answer.text().await.unwrap();
            assert_ne!(status, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
            assert!(
                !text.contains("there is nothing here") && status.as_u16() < 500,
                "{method} {path}: {status} {text}"
            );
            let is_open = operation["description"].as_str().unwrap().contains("join token")
                || operation["description"].as_str().unwrap().contains("nothing");
            let unknown = stranger.ask(method.clone(), &filled).body("{}").send().await.unwrap().status();
            assert_eq!(unknown == StatusCode::UNAUTHORIZED, !is_open, "{method} {path}: {unknown}");
        }
    }
    assert!(count >= 25, "{count}");
    // What is not in the document is not served.
    for path in ["/api/v1/", "/api/v1/nothing", "/api/v1/apps/hello", "/api/v2/apps"] {
        let status = ops.get(path).await.status();
        assert!(matches!(status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED), "{path}: {status}");
    }
    let node = world.by_certificate(&Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() });
    assert_eq!(node.get("/api/v1/openapi.json").await.status(), StatusCode::OK);
}
