//! Several requests at once in one instance: what they share, and what becomes of them.

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt;
use spin_sdk::http::{BoxBody, FullBody, Request, Response, StatusCode, body, box_body};
use spin_sdk::{http_service, time, wasip3};

/// Pause between two chunks.
const CHUNK_PAUSE: Duration = Duration::from_millis(20);
/// Longer than any node waits.
const A_DAY: Duration = Duration::from_secs(86_400);
/// Bytes of a chunk.
const CHUNK_BYTES: usize = 1024;

// An instance has one thread.
thread_local! {
    static COUNT: Cell<u32> = const { Cell::new(0) };
    static NOW: Cell<u32> = const { Cell::new(0) };
    static MOST: Cell<u32> = const { Cell::new(0) };
    static KEPT: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

#[http_service]
async fn serve(request: Request) -> Response<BoxBody> {
    let here = Here::new();
    let path = request.uri().path().to_owned();
    let mut parts = path.trim_start_matches('/').splitn(2, '/');
    let name = parts.next().unwrap_or_default();
    let number: u32 = parts.next().and_then(|number| number.parse().ok()).unwrap_or_default();
    match name {
        "" => {}
        "wait" => time::sleep(Duration::from_millis(number.into())).await,
        "stream" => return Response::new(stream(number, here)),
        "late" => wasip3::spawn(time::sleep(Duration::from_millis(number.into()))),
        "grow" => KEPT.with_borrow_mut(|kept| kept.push(vec![1; number as usize * 1024 * 1024])),
        "trap" => panic!("as asked"),
        "burn" => loop {
            black_box(&here);
        },
        // Not `pending()`: the engine ends an instance that waits for nothing.
        "never" => time::sleep(A_DAY).await,
        _ => {
            let mut response = text("no such page\n".into());
            *response.status_mut() = StatusCode::NOT_FOUND;
            return response;
        }
    }
    text(here.told())
}

/// A request that is here.
struct Here {
    count: u32,
}

impl Here {
    fn new() -> Self {
        let count = COUNT.get() + 1;
        COUNT.set(count);
        NOW.set(NOW.get() + 1);
        MOST.set(MOST.get().max(NOW.get()));
        Self { count }
    }

    fn told(&self) -> String {
        format!("{} {}\n", self.count, MOST.get())
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        NOW.set(NOW.get() - 1);
    }
}

/// Chunks one by one, then what the others are told.
fn stream(chunks: u32, here: Here) -> BoxBody {
    let (mut sender, body) = body::stream::<String>();
    wasip3::spawn(async move {
        for _ in 0..chunks {
            if sender.send(".".repeat(CHUNK_BYTES)).await.is_err() {
                return; // the client left
            }
            time::sleep(CHUNK_PAUSE).await;
        }
        let _ = sender.send(here.told()).await;
    });
    box_body(body)
}

fn text(text: String) -> Response<BoxBody> {
    Response::new(box_body(FullBody::new(Bytes::from(text))))
}
