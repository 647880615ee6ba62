//! The small hello for wasi:http 0.3: plain, echoed and streamed answers.

use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt;
use spin_sdk::http::{BoxBody, FullBody, Request, Response, StatusCode, body, box_body};
use spin_sdk::{http_service, time, wasip3};

/// Chunks that `/stream` sends.
const CHUNKS: u32 = 5;

/// Pause between two chunks, so that a reader can see them come one by one.
const CHUNK_PAUSE: Duration = Duration::from_millis(100);

#[http_service]
async fn serve(request: Request) -> Response<BoxBody> {
    let path = request.uri().path();
    println!("{} {path}", request.method());
    eprintln!("hello-p3: serving {path}");
    match path {
        "/" => text(StatusCode::OK, "Hello from Selvage\n"),
        // The incoming body is handed on as the outgoing one; its chunks go back as they come.
        "/echo" => Response::new(box_body(request.into_body())),
        "/stream" => Response::new(stream()),
        _ => text(StatusCode::NOT_FOUND, "no such page\n"),
    }
}

/// A body that is written while it is being sent: the response's head goes out first.
fn stream() -> BoxBody {
    let (mut sender, body) = body::stream::<String>();
    wasip3::spawn(async move {
        for chunk in 1..=CHUNKS {
            if chunk > 1 {
                time::sleep(CHUNK_PAUSE).await;
            }
            if sender.send(format!("chunk {chunk} of {CHUNKS}\n")).await.is_err() {
                break; // the client left
            }
        }
    });
    box_body(body)
}

fn text(status: StatusCode, text: &'static str) -> Response<BoxBody> {
    let mut response = Response::new(box_body(FullBody::new(Bytes::from_static(text.as_bytes()))));
    *response.status_mut() = status;
    response
}
