//! The document of the API, OpenAPI 3.1, made from the table that the server answers by.

use serde_json::{Map, Value, json};

use super::{Route, schema};

/// Where it is had.
pub(super) const PATH: &str = "/api/v1/openapi.json";

/// Writes the document.
pub(super) fn write<'r>(routes: impl Iterator<Item = &'r Route>) -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for route in routes {
        let names = route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let parameters: Vec<Value> = names
            .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
            .collect();
        let problem = json!({ "$ref": "#/components/responses/Problem" });
        let mut operation = json!({
            "summary": route.summary,
            "description": format!("Needs: {}.", route.who),
            "parameters": parameters,
            "responses": { "2XX": { "description": "It was done." }, "4XX": problem, "5XX": problem },
        });
        if let Some(document) = route.takes {
            operation["requestBody"] = json!({
                "description": document,
                "content": {
                    "application/json": { "schema": { "$ref": format!("#/components/schemas/{document}") } },
                },
            });
        }
        let at = paths.entry(route.path.clone()).or_insert_with(|| json!({}));
        at[route.method.to_ascii_lowercase()] = operation;
    }
    let string = json!({ "type": "string" });
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Selvage control plane", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "security": [{ "token": [] }, { "certificate": [] }],
        "components": {
            "schemas": schema::all(),
            "securitySchemes": {
                "token": { "type": "http", "scheme": "bearer", "description": "An operator's token." },
                "certificate": { "type": "mutualTLS", "description": "A certificate of the fleet." },
            },
            "responses": {
                "Problem": {
                    "description": "It was not done.",
                    "content": { "application/json": { "schema": {
                        "type": "object",
                        "required": ["error"],
                        "properties": { "error": string, "hint": { "type": ["string", "null"] } },
                    } } },
                },
            },
        },
    })
}
