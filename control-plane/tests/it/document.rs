//! The document of the API against the server.

use std::collections::BTreeSet;

use reqwest::{Method, StatusCode};
use selvage_certs::Role;
use serde_json::{Value, json};

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
            let needs = operation["description"].as_str().unwrap();
            let is_open = ["a join token", "nothing", "has ended"].iter().any(|open| needs.contains(open));
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

#[tokio::test]
async fn every_body_is_described_as_the_server_reads_it() {
    let world = World::start_with(|config, directory| config.authority = Some(directory.join("ca"))).await;
    let node = world.node("fra-1");
    let document = json_of(world.ops().get("/api/v1/openapi.json").await, StatusCode::OK).await;
    let is_unread = async |method: &Method, path: &str, body: &Value, needs: &str| {
        let asker = match needs {
            _ if needs.contains("node's own") => node.clone(),
            _ if needs.contains("a join token") || needs.contains("has ended") => world.stranger(),
            _ => world.ops(),
        };
        let answer = asker.ask(method.clone(), path).json(body).send().await.unwrap();
        answer.text().await.unwrap().contains("is not the expected JSON")
    };
    let mut seen = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let path = path.replace("{app}", "hello").replace("{node}", "fra-1").replace("{release}", "1");
        let path = path.replace("{name}", "token").replace("{id}", "0a");
        for (method, operation) in operations.as_object().unwrap() {
            let Some(body) = operation.get("requestBody") else { continue };
            let needs = operation["description"].as_str().unwrap();
            let name = body["content"]["application/json"]["schema"]["$ref"].as_str().unwrap();
            let name = name.strip_prefix("#/components/schemas/").unwrap();
            let schema = &document["components"]["schemas"][name];
            let (method, example) = (method.to_uppercase().parse::<Method>().unwrap(), &schema["examples"][0]);
            assert!(!is_unread(&method, &path, example, needs).await, "{name}: {example}");
            seen.insert(name.to_owned());
            let Some(fields) = example.as_object() else { continue };
            // Nothing that is not described, nothing required left out, nothing described unknown.
            let mut more = fields.clone();
            more.insert("surprise".into(), 1.into());
            assert!(is_unread(&method, &path, &more.into(), needs).await, "{name} with a surprise");
            for required in schema["required"].as_array().unwrap() {
                let mut less = fields.clone();
                less.remove(required.as_str().unwrap()).unwrap();
                assert!(is_unread(&method, &path, &less.into(), needs).await, "{name} without {required}");
            }
            for field in fields.keys() {
                assert!(schema["properties"].get(field).is_some(), "{name}.{field}");
            }
            for (field, property) in schema["properties"].as_object().unwrap() {
                // A value of another type is read as this field, and refused for its type.
                let mut wrong = fields.clone();
                let other = if property["type"] == "boolean" { json!("x") } else { json!(true) };
                wrong.insert(field.clone(), other);
                assert!(is_unread(&method, &path, &wrong.into(), needs).await, "{name}.{field} of another type");
            }
        }
    }
    assert_eq!(seen.len(), document["components"]["schemas"].as_object().unwrap().len(), "{seen:?}");
}
