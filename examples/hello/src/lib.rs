//! Says hello, echoes, and shows what a guest sees of a request.

use std::collections::BTreeMap;

use futures::{SinkExt, StreamExt};
use spin_sdk::http::{Fields, IncomingRequest, OutgoingResponse, ResponseOutparam};
use spin_sdk::{http_component, variables};

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

#[http_component]
async fn serve(request: IncomingRequest, out: ResponseOutparam) {
    let path_with_query = request.path_with_query().unwrap_or_default();
    let path = path_with_query.split('?').next().unwrap_or_default();
    // One line to each stream, so that log capture has something to show for every request.
    println!("{} {path}", request.method());
    eprintln!("hello: serving {path}");

    match path {
        "/" => answer(out, 200, TEXT, "Hello from Selvage\n").await,
        "/echo" => echo(request, out).await,
        "/headers" => answer(out, 200, JSON, headers(&request)).await,
        "/env" => match variables::get("greeting") {
            Ok(greeting) => answer(out, 200, TEXT, format!("{greeting}\n")).await,
            Err(error) => answer(out, 500, TEXT, format!("variable greeting: {error}\n")).await,
        },
        _ => match path.strip_prefix("/status/").map(str::parse) {
            Some(Ok(status @ 200..=599)) => answer(out, status, TEXT, "").await,
            Some(_) => answer(out, 400, TEXT, "a status is a number from 200 to 599\n").await,
            None => answer(out, 404, TEXT, "no such page\n").await,
        },
    }
}

/// Sends every chunk of the request's body back as soon as it has come; nothing is collected.
async fn echo(request: IncomingRequest, out: ResponseOutparam) {
    let content_type = request.headers().get("content-type").into_iter().next();
    let content_type = content_type.unwrap_or_else(|| b"application/octet-stream".to_vec());
    let response = response(200, vec![("content-type".to_owned(), content_type)]);
    let mut sink = response.take_body();
    out.set(response);

    let mut chunks = request.into_body_stream();
    while let Some(chunk) = chunks.next().await {
        match chunk {
            // The client may leave at any time: then there is nobody to tell.
            Ok(chunk) => {
                if sink.send(chunk).await.is_err() {
                    return;
                }
            }
            Err(error) => return eprintln!("hello: request body: {}", error.to_debug_string()),
        }
    }
}

/// The request's headers as a JSON object; the values of a repeated header are joined by ", ".
fn headers(request: &IncomingRequest) -> String {
    let mut by_name = BTreeMap::<String, String>::new();
    for (name, value) in request.headers().entries() {
        let value = String::from_utf8_lossy(&value);
        by_name
            .entry(name)
            .and_modify(|values| *values = format!("{values}, {value}"))
            .or_insert_with(|| value.to_string());
    }
    serde_json::json!(by_name).to_string()
}

/// Sends a whole response. An empty body sends no content headers, as 204 and 304 demand.
async fn answer(out: ResponseOutparam, status: u16, content_type: &str, body: impl Into<Vec<u8>>) {
    let body = body.into();
    let mut headers = Vec::new();
    if !body.is_empty() {
        headers.push(("content-type".to_owned(), content_type.into()));
        headers.push(("content-length".to_owned(), body.len().to_string().into()));
    }
    if let Err(error) = out.set_with_body(response(status, headers), body).await {
        eprintln!("hello: response body: {error}");
    }
}

fn response(status: u16, headers: Vec<(String, Vec<u8>)>) -> OutgoingResponse {
    let headers = Fields::from_list(&headers).expect("our own headers are well formed");
    let response = OutgoingResponse::new(headers);
    response.set_status_code(status).expect("the status was checked");
    response
}
