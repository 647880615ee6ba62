;; A valid component that exports no HTTP handler, only `answer: func() -> u32`.
(component
  (core module $main-module
    (func (export "answer") (result i32) (i32.const 42)))
  (core instance $main (instantiate $main-module))
  (func (export "answer") (result u32) (canon lift (core func $main "answer")))
)
