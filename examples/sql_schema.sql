CREATE TABLE employees (name, department, city, salary, age, hire_date);
CREATE TABLE products (name, category, brand, price, stock, rating);
CREATE TABLE orders (customer, status, region, amount, quantity, order_date);
CREATE TABLE students (name, major, hometown, score, credits, enroll_date);
